// SPDX-License-Identifier: Apache-2.0
// Checks the kernel of csrc/cuda/tensor_product_embedding.cuh, run by cuda_emulator.h, against the
// definition.
#include "cuda_emulator.h"

#include "../csrc/cuda/tensor_product_embedding.cuh"

using namespace lean_kernels;

namespace {

std::mt19937 rng(3);
int failures = 0, cases = 0;

template <class S>
std::vector<S> draw(int64_t n) {
  std::vector<S> values(n);
  for (S& v : values) v = S(int32_t(rng()) * 0x1p-31);
  return values;
}

template <class T>
std::vector<T> pick(int64_t n, int64_t most) {
  std::vector<T> values(n);
  for (T& v : values) v = T(rng() % most);
  return values;
}

template <class S, class Morpheme, class Id>
void check(int order, int size, int features, int rank, int norm, int tables, bool broken) {
  const int words = 9, morphemes = 6, positions = 1 + int(rng() % 11);
  const auto factors = draw<S>(morphemes * rank * size);
  auto index = pick<Morpheme>(words * order, morphemes);
  auto ids = pick<Id>(positions, words);
  if (broken) {
    index[order - 1] = Morpheme(morphemes);  // of word 0
    ids[0] = Id(-1);
    ids[positions / 2] = 0;
  }
  std::vector<S> table[2], weight = draw<S>(features), bias = draw<S>(features);
  std::vector<int64_t> table_ids[2];
  ProductRows p{};
  p.ids = {ids.data(), index.data(), words, sizeof(Id) == 8};
  for (int t = 0; t < tables; ++t) {
    table[t] = draw<S>(4 * features);
    table_ids[t] = pick<int64_t>(positions, 4);
    p.added[t] = {table_ids[t].data(), table[t].data(), 4, true};
  }
  p.index_bytes = sizeof(Morpheme);
  p.factors = factors.data();
  p.morphemes = morphemes;
  p.rank = rank, p.size = size, p.order = order, p.features = features;
  std::vector<int64_t> below(order, 1);  // numbers per digit
  for (int k = order - 2; k >= 0; --k) below[k] = below[k + 1] * size;
  int64_t left = features;
  p.width = 1;
  for (int k = 0; k < order; ++k) {
    p.used[k] = int((left + below[k] - 1) / below[k]);
    left = std::min(left, below[k]);
    p.width *= k > 0 ? p.used[k] : 1;
  }
  p.norm = norm;
  p.weight = rng() % 4 ? weight.data() : nullptr;
  p.bias = rng() % 4 ? bias.data() : nullptr;
  p.eps = 1e-5;
  p.positions = positions;
  std::vector<S> y(positions * features, S(7));
  p.y = y.data();
  emulator::launch(1 + int(rng() % 3), kRowThreads, [&] { product_rows_kernel<S>(p); });

  double worst = 0, scale = 1e-30;
  bool right = true;
  for (int i = 0; i < positions; ++i) {
    const bool bad = ids[i] < 0 || (broken && ids[i] == 0);
    std::vector<double> row(features);
    double mean = 0, square = 0;
    for (int k = 0; k < features && !bad; ++k) {
      for (int r = 0; r < rank; ++r) {
        double product = 1;
        for (int j = 0; j < order; ++j) {
          const int digit = int(k / below[j] % size);
          product *= factors[(index[ids[i] * order + j] * rank + r) * size + digit];
        }
        row[k] += product;
      }
      for (int t = 0; t < tables; ++t) row[k] += table[t][table_ids[t][i] * features + k];
      mean += row[k] / features;
    }
    if (norm != 1) mean = 0;
    for (double v : row) square += (v - mean) * (v - mean) / features;
    for (int k = 0; k < features; ++k) {
      const double actual = y[int64_t(i) * features + k];
      if (bad) {
        right &= std::isnan(actual);
        continue;
      }
      double expected = row[k];
      if (norm) {
        expected = (expected - mean) / std::sqrt(square + p.eps);
        if (p.weight) expected *= weight[k];
        if (p.bias) expected += bias[k];
      }
      worst = std::max(worst, std::abs(actual - expected));
      scale = std::max(scale, std::abs(expected));
    }
  }
  ++cases;
  right &= worst <= scale * (sizeof(S) == 8 ? 1e-11 : 1e-4);
  if (!right && ++failures <= 10)
    std::printf("FAIL case %d: order %d, size %d, features %d, rank %d, norm %d: %g of %g\n", cases,
                order, size, features, rank, norm, worst, scale);
}

}  // namespace

int main() {
  // MorphTE's tile, less of it, several tiles each way, few of the digits, and one number.
  const int shapes[][4] = {{3, 8, 512, 10}, {3, 8, 500, 3}, {3, 10, 1000, 2}, {2, 28, 768, 4},
                           {4, 6, 700, 2},  {4, 2, 11, 1},  {3, 9, 40, 2},    {2, 1, 1, 3}};
  for (const auto& [order, size, features, rank] : shapes)
    for (int norm = 0; norm < 3; ++norm)
      for (int tables = 0; tables < 3; ++tables) {
        check<float, int32_t, int64_t>(order, size, features, rank, norm, tables, false);
        check<double, int64_t, int32_t>(order, size, features, rank, norm, tables, tables == 1);
        check<float, int16_t, int64_t>(order, size, features, rank, norm, tables, true);
      }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}

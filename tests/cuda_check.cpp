// SPDX-License-Identifier: Apache-2.0
// Checks the kernels of csrc/cuda/token_compaction.cuh, run by cuda_emulator.h, against a sort.
#include "cuda_emulator.h"

#include "../csrc/cuda/token_compaction.cuh"

using namespace lean_kernels;

namespace {

std::mt19937 rng(2);
int failures = 0, cases = 0;

void expect(bool right, const char* what) {
  ++cases;
  if (!right && ++failures <= 10) std::printf("FAIL case %d: %s\n", cases, what);
}

template <class S>
S draw(int kind) {
  static const double odd[] = {0.0, -0.0, 1.0, -1.0, NAN, -NAN, INFINITY, -INFINITY, 1e-45, -3e38};
  if (kind == 0) return S(int32_t(rng()) * 0x1p-31);
  if (kind == 1) return S(double(rng() % 4));  // ties
  return S(odd[rng() % 10]);
}

struct Problem {
  std::vector<int32_t> cu, wanted;
  std::vector<uint8_t> protect;
  int mode;
  double value;
};

template <class S>
std::vector<int64_t> sorted(const std::vector<S>& scores, const Problem& p, std::vector<int32_t>& cu) {
  std::vector<int64_t> kept;
  cu.assign(1, 0);
  for (size_t b = 0; b + 1 < p.cu.size(); ++b) {
    const int begin = p.cu[b], end = p.cu[b + 1], length = end - begin;
    const auto guarded = [&](int i) { return p.protect.empty() ? i == begin : p.protect[i] != 0; };
    std::vector<int> rank(length);
    std::iota(rank.begin(), rank.end(), begin);
    int count = 0, guards = 0;
    for (int i : rank) guards += guarded(i);
    if (p.mode == kThreshold) {
      const auto last = std::stable_partition(rank.begin(), rank.end(), [&](int i) {
        return guarded(i) || scores[i] >= S(p.value);
      });
      count = int(last - rank.begin());
    } else {
      std::stable_sort(rank.begin(), rank.end(), [&](int i, int j) {
        if (guarded(i) != guarded(j)) return guarded(i);
        if (std::isnan(scores[i]) || std::isnan(scores[j]))
          return !std::isnan(scores[i]) && std::isnan(scores[j]);
        return scores[i] > scores[j];
      });
      count = p.mode == kCounts ? std::max(p.wanted[b], 0)
                                : std::max(1, int(std::ceil(p.value * length - 1e-6)));
      count = std::max(std::min(count, length), guards);
    }
    std::sort(rank.begin(), rank.begin() + count);
    kept.insert(kept.end(), rank.begin(), rank.begin() + count);
    cu.push_back(int32_t(kept.size()));
  }
  return kept;
}

template <class S>
void check(Problem p, int kind, int64_t extra) {
  const int64_t tokens = p.cu.back(), sequences = int64_t(p.cu.size()) - 1;
  // On the heap and of the exact size: what reads or writes beyond, the address sanitizer stops.
  std::vector<S> scores(tokens);
  for (S& s : scores) s = draw<S>(kind);
  std::vector<int32_t> counts(sequences, -7), listed(tokens, -7), cu_kept(sequences + 1, -7), cu;
  const std::vector<int64_t> expected = sorted(scores, p, cu);
  const int64_t total = std::max<int64_t>(0, int64_t(expected.size()) + extra);
  const Selection select{scores.data(),
                         p.cu.data(),
                         p.protect.empty() ? nullptr : p.protect.data(),
                         p.wanted.data(),
                         counts.data(),
                         listed.data(),
                         tokens,
                         int32_t(sequences),
                         p.mode,
                         p.value};
  emulator::launch(int(sequences), kSelectThreads, [&] { select_kernel<S>(select); });

  // Rows of 48 bytes, of 6 with a stride of 10, and of 3.
  const int64_t sizes[][2] = {{48, 48}, {6, 10}, {3, 3}};
  const int log_words[] = {4, 1, 0};
  std::vector<std::vector<char>> from, to;
  Moves moves{};
  for (int t = 0; t < 3; ++t) {
    from.emplace_back(tokens * sizes[t][1]);
    for (char& c : from.back()) c = char(rng());
    to.emplace_back(total * sizes[t][0], char(0x55));
    moves.move[moves.count++] = {from[t].data(), to[t].data(), sizes[t][1],
                                 sizes[t][0] >> log_words[t], log_words[t]};
  }
  std::vector<int64_t> indices(total, -7);
  const Compaction compact{p.cu.data(),    counts.data(), listed.data(), indices.data(),
                           cu_kept.data(), tokens,        total,         int32_t(sequences)};
  const int blocks = 1 + int(rng() % 5);
  emulator::launch(blocks, kMoveThreads, [&] { compact_kernel(compact, moves); });

  std::vector<int64_t> wanted = expected;
  wanted.resize(total, -1);
  expect(indices == wanted, "indices");
  for (int32_t& c : cu) c = int32_t(std::min<int64_t>(c, total));
  expect(cu_kept == cu, "cu_seqlens");
  const auto rows_are_right = [&](const std::vector<int64_t>& sources) {
    for (int t = 0; t < 3; ++t)
      for (int64_t row = 0; row < int64_t(sources.size()); ++row)
        for (int64_t i = 0; i < sizes[t][0]; ++i) {
          const bool real = sources[row] >= 0 && sources[row] < tokens;
          const char want = real ? from[t][sources[row] * sizes[t][1] + i] : 0;
          if (to[t][row * sizes[t][0] + i] != want) return false;
        }
    return true;
  };
  expect(rows_are_right(wanted), "rows");

  for (int64_t& i : wanted) i = int64_t(rng() % (tokens + 4)) - 2;  // some out of bounds
  for (auto& t : to) std::fill(t.begin(), t.end(), char(0x55));
  emulator::launch(blocks, kMoveThreads,
                   [&] { gather_kernel(wanted.data(), total, tokens, moves); });
  expect(rows_are_right(wanted), "gathered rows");
}

Problem random_problem(const std::vector<int>& lengths, int mode) {
  Problem p{{0}, {}, {}, mode, mode == kThreshold ? 0.1 : (1 + rng() % 100) / 100.0};
  for (int length : lengths) {
    p.cu.push_back(p.cu.back() + length);
    p.wanted.push_back(int(rng() % (length + 4)) - 2);
  }
  if (rng() % 2) {
    p.protect.resize(p.cu.back() + 1);
    for (uint8_t& b : p.protect) b = rng() % 8 == 0;
  }
  return p;
}

}  // namespace

int main() {
  const std::vector<std::vector<int>> shapes = {
      {}, {0, 0}, {1}, {5, 0, 130, 1, 31, 32, 33}, {128, 129, 127}, {400}};
  const int64_t extras[] = {0, 5, -2};  // said to be kept, beyond what is
  for (const auto& lengths : shapes)
    for (int mode : {kFraction, kCounts, kThreshold})
      for (int kind = 0; kind < 3; ++kind) {
        check<float>(random_problem(lengths, mode), kind, extras[rng() % 3]);
        check<double>(random_problem(lengths, mode), kind, extras[rng() % 3]);
      }
  check<float>({{0, 100}, {100}, {}, kFraction, 0.07}, 0, 0);  // 0.07 * 100 is above 7
  // More sequences than compact_kernel adds up at a time.
  std::vector<int> many(kMoveThreads * kScanItems + 300);
  for (int& length : many) length = int(rng() % 3);
  check<float>(random_problem(many, kFraction), 0, 0);

  // cu_seqlens that mean nothing must not lead outside the tensors.
  for (const std::vector<int32_t>& cu : {std::vector<int32_t>{3, 8, 12, 20}, {0, 30, 4, 20},
                                         {0, -5, 12, 4000}, {7, 2, 20, 20}}) {
    std::vector<float> scores(20, 1.0f);
    std::vector<int32_t> counts(3), listed(20, -1), cu_kept(4);
    std::vector<int64_t> indices(30, -7);
    const Selection select{scores.data(), cu.data(), nullptr, nullptr, counts.data(),
                           listed.data(), 20,        3,       kFraction, 0.5};
    emulator::launch(3, kSelectThreads, [&] { select_kernel<float>(select); });
    const Compaction compact{cu.data(), counts.data(), listed.data(), indices.data(),
                             cu_kept.data(), 20, 30, 3};
    emulator::launch(2, kMoveThreads, [&] { compact_kernel(compact, Moves{}); });
    expect(std::all_of(indices.begin(), indices.end(), [](int64_t i) { return -1 <= i && i < 20; }),
           "indices of bad cu_seqlens");
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}

// SPDX-License-Identifier: Apache-2.0
// tensor_product_embedding of one instruction set. A row is a product [q, r] x [r, q^(n-1)] with the
// ranks as its inner dimension, all of it in L1; in the gradient the ranks lie in a vector's lanes.
#include "../isa.h"

#include <algorithm>
#include <cmath>

#include "embedding_row.h"
#include "tensor_product_parts.h"

namespace lean_kernels {
namespace {

template <class S>
bool make_rows(const TensorProduct& p, const EmbeddingRows& end, const Piece* pieces, int64_t count,
               const uint32_t* positions, void* memory) {
  using A = typename Accumulator<S>::type;
  Arena<A> arena{static_cast<A*>(memory)};
  RowScratch<A> scratch(p, arena);
  const bool added = end.added[0].ids;
  A* made = scratch.made;
  A* summed = added ? arena.take(p.features) : made;
  // Where an id occurs again, its normalised row is only copied.
  EmbeddingRows in_place = end, copy = end;
  in_place.out = made;
  in_place.stream = false;
  copy.norm = kNoNorm;
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    int64_t index[kMostOrder] = {};
    if (!p.morphemes_of(piece.id, index)) return false;
    if (i + 2 < count) prefetch_factors<S>(p, pieces[i + 2].id);
    read_all<S>(p, index, scratch);
    make_row(p, scratch);
    const bool repeated = piece.end - piece.begin > 1 && end.norm != kNoNorm && !added;
    if (repeated) finish_row<A>(in_place, 0, made, made);
    for (uint32_t at = piece.begin; at < piece.end; ++at)
      finish_row<S>(repeated ? copy : end, positions ? positions[at] : at, made, summed);
  }
  if (end.stream) end_of_stores();
  return true;
}

// sums += g * normal and g, dx = the gradient of x, for g that of the row normalised. In place if dx
// is g.
template <class A>
void norm_grad(const EmbeddingRows& p, const A* x, const A* g, A* sums, A* dx) {
  const int64_t n = p.features;
  const A* weight = static_cast<const A*>(p.weight);
  const bool layer = p.norm == kLayerNorm;
  const A center =
      layer ? sum_over<A>(n, [&](int64_t i, auto kind) { return read(kind, x + i); }) / A(n) : A(0);
  const A scale = A(1) / std::sqrt(squared_distance(x, center, n) / A(n) + A(p.eps));
  const auto normal = [&](int64_t i, auto kind) { return (read(kind, x + i) - center) * scale; };
  const auto scaled = [&](int64_t i, auto kind) {
    return weight ? read(kind, g + i) * read(kind, weight + i) : read(kind, g + i);
  };
  const A along = sum_over<A>(n, [&](int64_t i, auto kind) {
    const auto v = normal(i, kind), upstream = read(kind, g + i);
    keep(sums + i, read(kind, sums + i) + upstream * v);
    keep(sums + n + i, read(kind, sums + n + i) + upstream);
    return scaled(i, kind) * v;
  }) / A(n);
  const A mean = layer ? sum_over<A>(n, scaled) / A(n) : A(0);
  sum_over<A>(n, [&](int64_t i, auto kind) {
    return keep(dx + i, (scaled(i, kind) - mean - normal(i, kind) * along) * scale);
  });
}

// Of t [digits, width] with the ranks in lanes, or the same for all ranks where it is `scalars`:
// share[a] = sum over w of t[a, w] tail[w], left[w] = sum over a of t[a, w] factor[a].
template <int digits, bool scalars, class A>
LK_INLINE void split_digits(const A* t, int64_t width, const A* factor, const A* tail, A* share,
                            A* left, bool first) {
  constexpr int W = kLanes<A>;
  Vec<A> f[digits], sum[digits] = {};
#pragma GCC unroll 8
  for (int a = 0; a < digits; ++a) f[a] = load(factor + a * W);
  for (int64_t w = 0; w < width; ++w) {
    const Vec<A> tails = load(tail + w * W);
    Vec<A> rest = first ? Vec<A>{} : load(left + w * W);
#pragma GCC unroll 8
    for (int a = 0; a < digits; ++a) {
      const Vec<A> v = scalars ? splat(t[a * width + w]) : load(t + (a * width + w) * W);
      sum[a] += v * tails;
      rest += v * f[a];
    }
    store(left + w * W, rest);
  }
#pragma GCC unroll 8
  for (int a = 0; a < digits; ++a) store(share + a * W, sum[a]);
}

template <bool scalars, class A>
void split(const A* t, int64_t digits, int64_t width, const A* factor, const A* tail, A* share,
           A* left) {
  constexpr int W = kLanes<A>, kDigits = kVectorBytes == 64 ? 8 : 4;
  int64_t a = 0;
  const auto some = [&]<int count>() {
    split_digits<count, scalars>(t + a * width * (scalars ? 1 : W), width, factor + a * W, tail,
                                 share + a * W, left, a == 0);
    a += count;
  };
  while (a + kDigits <= digits) some.template operator()<kDigits>();
  if (digits - a >= 4) some.template operator()<4>();
  if (digits - a >= 2) some.template operator()<2>();
  if (digits - a >= 1) some.template operator()<1>();
}

// Factors, what they make and gradients, a vector of ranks for each number.
template <class A>
struct RankScratch {
  A *factors[kMostOrder] = {}, *tails[kMostOrder] = {}, *shares[kMostOrder] = {}, *left[2] = {};

  RankScratch(const TensorProduct& p, Arena<A>& arena) {
    constexpr int W = kLanes<A>;
    for (int k = 0; k < p.order; ++k) factors[k] = arena.take(p.used[k] * W);
    for (int k = 0; k < p.order; ++k) shares[k] = arena.take(p.used[k] * W);
    tails[p.order - 1] = factors[p.order - 1];
    for (int k = p.order - 2; k > 0; --k) tails[k] = arena.take(p.width[k] * W);
    for (A*& buffer : left) buffer = arena.take(p.width[1] * W);
  }
};

// shares [order, rank, size] = the gradient of the factors of one row, for `g` [width[0]] its own.
template <class A>
void factor_grads(const TensorProduct& p, A* const (&factors)[kMostOrder], const A* g,
                  RankScratch<A>& s, A* shares) {
  constexpr int W = kLanes<A>;
  const int last = p.order - 1;
  for (int64_t rank = 0; rank < p.rank; rank += W) {
    const int64_t lanes = std::min<int64_t>(W, p.rank - rank);
    for (int k = 0; k <= last; ++k)
      for (int64_t i = 0; i < lanes; ++i)
        for (int64_t a = 0; a < p.used[k]; ++a)
          s.factors[k][a * W + i] = factors[k][(rank + i) * p.size + a];
    for (int k = last - 1; k > 0; --k)
      for (int64_t a = 0; a < p.used[k]; ++a) {
        const Vec<A> f = load(s.factors[k] + a * W);
        for (int64_t w = 0; w < p.width[k + 1]; ++w)
          store(s.tails[k] + (a * p.width[k + 1] + w) * W, f * load(s.tails[k + 1] + w * W));
      }
    const A* t = g;
    for (int k = 0; k < last; ++k) {
      A* left = k + 1 == last ? s.shares[last] : s.left[k % 2];
      if (k == 0) {
        split<true>(t, p.used[k], p.width[k + 1], s.factors[k], s.tails[k + 1], s.shares[k], left);
      } else {
        split<false>(t, p.used[k], p.width[k + 1], s.factors[k], s.tails[k + 1], s.shares[k], left);
      }
      t = left;
    }
    for (int k = 0; k <= last; ++k) {
      A* to = shares + (k * p.rank + rank) * p.size;
      if (p.used[k] < p.size) std::fill(to, to + lanes * p.size, A(0));
      for (int64_t i = 0; i < lanes; ++i)
        for (int64_t a = 0; a < p.used[k]; ++a) to[i * p.size + a] = s.shares[k][a * W + i];
    }
  }
}

template <class S>
bool make_grads(const TensorProduct& p, const EmbeddingRows& end, const TensorProductGrads& out,
                const Piece* pieces, int64_t count, void* memory) {
  using A = typename Accumulator<S>::type;
  const int64_t n = p.features;
  Arena<A> arena{static_cast<A*>(memory)};
  RowScratch<A> scratch(p, arena);
  A* summed = arena.take(n);
  A* g = arena.take(p.width[0]);
  const int64_t start = arena.taken;
  RankScratch<A> ranks(p, arena);
  // Lanes of no rank are never kept; as numbers they cost no time.
  std::fill(arena.memory + start, arena.memory + arena.taken, A(0));
  A* sums = static_cast<A*>(out.weight);
  const uint32_t last = pieces[count - 1].end - 1;
  const auto row_of = [&](uint32_t at) {
    return static_cast<const S*>(out.grad) + out.positions[at] * n;
  };
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    int64_t index[kMostOrder] = {};
    if (!p.morphemes_of(piece.id, index)) return false;
    if (i + 2 < count) prefetch_factors<S>(p, pieces[i + 2].id);
    read_all<S>(p, index, scratch);
    if (end.norm != kNoNorm) make_row(p, scratch);
    std::fill(g, g + p.width[0], A(0));
    for (uint32_t at = piece.begin; at < piece.end; ++at) {
      const S* upstream = row_of(at);
      const S* next = row_of(std::min(at + 1, last));
      for (int64_t j = 0; j < n; j += 64 / sizeof(S)) __builtin_prefetch(next + j, 0, 2);
      if (!out.rows) {
        sum_over<A>(n, [&](int64_t j, auto kind) {
          return keep(g + j, read(kind, g + j) + read(kind, upstream + j));
        });
        continue;
      }
      A* row = static_cast<A*>(out.rows) + (at - out.first) * n;
      sum_over<A>(n, [&](int64_t j, auto kind) { return keep(row + j, read(kind, upstream + j)); });
      if (end.norm != kNoNorm) {
        add_rows<S>(end, out.positions[at], scratch.made, summed);
        norm_grad(end, summed, row, sums, row);
      }
      sum_over<A>(n, [&](int64_t j, auto kind) {
        return keep(g + j, read(kind, g + j) + read(kind, row + j));
      });
    }
    if (!out.rows && end.norm != kNoNorm) norm_grad(end, scratch.made, g, sums, g);
    factor_grads(p, scratch.factors, g, ranks,
                 static_cast<A*>(out.shares) + i * p.order * p.rank * p.size);
  }
  return true;
}

template <class A>
void add_listed(const void* from, const uint32_t* positions, int64_t count, int64_t stride,
                int64_t length, void* to) {
  constexpr int W = kLanes<A>, kVectors = 8;
  A* sums = static_cast<A*>(to);
  const auto row = [&](int64_t i) { return static_cast<const A*>(from) + positions[i] * stride; };
  int64_t j = 0;
  const auto some = [&]<int vectors>() {
    Vec<A> sum[vectors] = {};
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] += load(row(i) + j + v * W);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(sums + j + v * W, load(sums + j + v * W) + sum[v]);
    j += vectors * W;
  };
  while (j + kVectors * W <= length) some.template operator()<kVectors>();
  while (j + W <= length) some.template operator()<1>();
  for (; j < length; ++j) {
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += row(i)[j];
    sums[j] += sum;
  }
}

template <class S>
size_t scratch_bytes(const TensorProduct& p) {
  using A = typename Accumulator<S>::type;
  Arena<A> arena{nullptr};
  RowScratch<A>(p, arena);
  RankScratch<A>(p, arena);
  arena.take(p.features);
  arena.take(p.width[0]);
  return arena.taken * sizeof(A);
}

template <class S>
constexpr TensorProductKernels kKernels = {scratch_bytes<S>, make_rows<S>, make_grads<S>,
                                           add_listed<typename Accumulator<S>::type>};

}  // namespace

const TensorProductKernels LEAN_KERNELS_ISA::tensor_product[kDtypes] = {
    kKernels<float>, kKernels<BFloat16>, kKernels<Float16>, kKernels<double>};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// The products that make up a row of tensor_product_embedding, for one instruction set.
#pragma once

#include <type_traits>
#include <utility>

#include "../tensor_product_embedding.h"
#include "vec.h"

namespace lean_kernels {
namespace {

template <class A>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Scratch dealt out in whole vectors. Kernels load and store up to a vector past what they need.
template <class A>
struct Arena {
  A* memory;  // null: only measured
  int64_t taken = 0;

  A* take(int64_t n) {
    A* part = memory ? memory + taken : nullptr;
    taken += whole_vectors<A>(n) + kLanes<A>;
    return part;
  }
};

// Fetches what the pieces after the first need: the morphemes first, whose factors come later.
template <class S>
LK_INLINE void prefetch_pieces(const TensorProduct& p, const Piece* pieces, int64_t count) {
  constexpr int64_t kMorphemes = 6, kFactors = 2;
  if (count > kMorphemes)
    __builtin_prefetch(static_cast<const char*>(p.morphemes) +
                       pieces[kMorphemes].id * p.order * p.morpheme_bytes);
  int64_t index[kMostOrder];
  if (count <= kFactors || !p.morphemes_of(pieces[kFactors].id, index)) return;
  const int64_t bytes = p.rank * p.size * int64_t(sizeof(S));
  for (int k = 0; k < p.order; ++k) {
    const char* row = static_cast<const char*>(p.factors) + index[k] * bytes;
    for (int64_t b = 0; b < bytes && b < 1024; b += 64) __builtin_prefetch(row + b);
  }
}

// to = the factors [rank, size] of one morpheme, widened, a vector of anything after it.
template <class S, class A>
LK_INLINE void read_factors(const TensorProduct& p, int64_t morpheme, A* to) {
  const int64_t n = p.rank * p.size;
  const S* from = static_cast<const S*>(p.factors) + morpheme * n;
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) store(to + i, load_wide(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

// Lane l of `at`: from[l / group], with `cycle` from[l % group].
template <class A, bool cycle, int... lane>
LK_INLINE Vec<A> spread(const A* from, int group, std::integer_sequence<int, lane...>) {
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> I;
  const Vec<I> lanes = {lane...};
  const int shift = __builtin_ctz(group);
  return __builtin_shuffle(load(from), cycle ? (lanes & I(group - 1)) : (lanes >> I(shift)));
}

// v in the first n lanes, 0 in the others.
template <class A, int... lane>
LK_INLINE Vec<A> first_lanes(Vec<A> v, int64_t n, std::integer_sequence<int, lane...>) {
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> I;
  const Vec<I> lanes = {lane...};
  return lanes < I(n) ? v : Vec<A>{};
}

// to[i][a * width + t] = factor[i][a] * tail[i][t] for a < digits, t < width; ranks i `size` apart
// in factor, `tail_stride` in tail, digits * width in to.
template <class A>
LK_INLINE void tensor_product(const A* factor, const A* tail, A* to, int64_t rank, int64_t size,
                              int64_t tail_stride, int64_t digits, int64_t width) {
  constexpr int W = kLanes<A>;
  constexpr auto kAll = std::make_integer_sequence<int, W>();
  const bool several = width < W && W % width == 0;  // digits in one vector
  for (int64_t i = 0; i < rank; ++i, factor += size, tail += tail_stride, to += digits * width) {
    if (several) {
      const Vec<A> t = spread<A, true>(tail, int(width), kAll);
      for (int64_t a = 0; a < digits; a += W / width)
        store(to + a * width, t * spread<A, false>(factor + a, int(width), kAll));
    } else {
      // Upwards: what is written past the end of a digit, the next one writes over.
      for (int64_t a = 0; a < digits; ++a)
        for (int64_t t = 0; t < width; t += W)
          store(to + a * width + t, splat(factor[a]) * load(tail + t));
    }
  }
}

// What a matrix product multiplies: factor(row, i) lies at row * row_step + i * step.
template <class A>
struct Factor {
  const A* at;
  int64_t row_step, step;
};

// A tile of y[a][t] = sum over i < count of factor(a, i) * tail[i][t].
template <int rows, int vectors, class A>
LK_INLINE void multiply_tile(Factor<A> factor, const A* tail, A* y, int64_t count,
                             int64_t tail_stride, int64_t width) {
  constexpr int W = kLanes<A>;
  Vec<A> sum[rows][vectors] = {};
  for (int64_t i = 0; i < count; ++i, factor.at += factor.step, tail += tail_stride) {
    Vec<A> t[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) t[v] = load(tail + v * W);
#pragma GCC unroll 8
    for (int a = 0; a < rows; ++a) {
      const Vec<A> f = splat(factor.at[a * factor.row_step]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[a][v] += f * t[v];
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < rows; ++a)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(y + a * width + v * W, sum[a][v]);
}

template <int vectors, class A>
LK_INLINE void multiply_rows(int64_t rows, Factor<A> factor, const A* tail, A* y, int64_t count,
                             int64_t tail_stride, int64_t width) {
  switch (rows) {
    case 1: return multiply_tile<1, vectors>(factor, tail, y, count, tail_stride, width);
    case 2: return multiply_tile<2, vectors>(factor, tail, y, count, tail_stride, width);
    case 3: return multiply_tile<3, vectors>(factor, tail, y, count, tail_stride, width);
    default: return multiply_tile<4, vectors>(factor, tail, y, count, tail_stride, width);
  }
}

// y[a][t] as above for a < rows, t < width.
template <class A>
void multiply(Factor<A> factor, const A* tail, int64_t tail_stride, A* y, int64_t count,
              int64_t rows, int64_t width) {
  constexpr int W = kLanes<A>, kRows = 4, kVectors = kVectorBytes == 64 ? 4 : 2;
  const int64_t vectors = (width + W - 1) / W;
  // A row's last vector spills into the next row. Tiles go down from it and rows up, so that what
  // is right is written last.
  for (int64_t a = 0; a < rows; a += kRows, factor.at += kRows * factor.row_step) {
    const int64_t some = rows - a < kRows ? rows - a : kRows;
    for (int64_t v = (vectors - 1) / kVectors * kVectors; v >= 0; v -= kVectors) {
      const auto tile = [&]<int columns>() {
        multiply_rows<columns>(some, factor, tail + v * W, y + a * width + v * W, count,
                               tail_stride, width);
      };
      const int64_t left = vectors - v;
      if (left >= kVectors) tile.template operator()<kVectors>();
      else if (left == 1) tile.template operator()<1>();
      else if (left == 2) tile.template operator()<2>();
      else tile.template operator()<3>();
    }
  }
}

// What a row is made from and in.
template <class A>
struct RowScratch {
  A *factors[kMostOrder] = {}, *tails[kMostOrder] = {}, *made = nullptr;

  RowScratch(const TensorProduct& p, Arena<A>& arena) {
    for (int k = 0; k < p.order; ++k) factors[k] = arena.take(p.rank * p.size);
    tails[p.order - 1] = factors[p.order - 1];
    for (int k = p.order - 2; k > 0; --k) tails[k] = arena.take(p.rank * p.width[k]);
    made = arena.take(p.width[0]);
  }
};

// scratch.factors = those of these morphemes.
template <class S, class A>
void read_all(const TensorProduct& p, const int64_t (&index)[kMostOrder], RowScratch<A>& scratch) {
  for (int k = 0; k < kMostOrder && k < p.order; ++k)
    read_factors<S>(p, index[k], scratch.factors[k]);
}

// Elements from rank to rank of scratch.tails[k].
inline int64_t tail_stride(const TensorProduct& p, int k) {
  return k == p.order - 1 ? p.size : p.width[k];
}

// scratch.tails = the products of scratch.factors[k] and those after it, k from 1.
template <class A>
void make_tails(const TensorProduct& p, RowScratch<A>& scratch) {
  for (int k = p.order - 2; k > 0; --k)
    tensor_product(scratch.factors[k], scratch.tails[k + 1], scratch.tails[k], p.rank, p.size,
                   tail_stride(p, k + 1), p.used[k], p.width[k + 1]);
}

// scratch.made = the row of scratch.factors, by its tails.
template <class A>
void make_row(const TensorProduct& p, RowScratch<A>& scratch) {
  make_tails(p, scratch);
  multiply<A>({scratch.factors[0], 1, p.size}, scratch.tails[1], tail_stride(p, 1), scratch.made,
              p.rank, p.used[0], p.width[1]);
}

}  // namespace
}  // namespace lean_kernels

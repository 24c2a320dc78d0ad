// SPDX-License-Identifier: Apache-2.0
// Panels and strips that ragged_attention packs, and the register tiles that multiply them.
#pragma once

#include "attention_softmax.h"
#include "multiply_add.h"

namespace lean_kernels {
namespace {

constexpr int64_t kRowsAhead = 16;  // asked for while packing

template <class S>
LK_INLINE void prefetch_row(const S* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + i, 0, 3);
}

// One row as packed elements, `width` of them, zeros past the end.
template <class M, class S>
LK_INLINE void pack_row(const S* from, int64_t dim, typename M::P* to, int64_t width) {
  constexpr int W = kLanes<typename M::P>, K = M::kInputs;
  int64_t d = 0;
  for (; d + W <= dim / K; d += W) store(to + d, M::load_packed(from + d * K));
  for (; d * K < dim; ++d) to[d] = M::pack_one(from + d * K, dim - d * K);
  for (; d < width; ++d) to[d] = 0;
}

// Rows of a panel as [packed elements of dim][width], zeros past the last row.
template <class M, class S, class P = typename M::P>
void pack_panel_of_keys(const S* from, int64_t ld, int64_t rows, int64_t dim, P* to,
                        int64_t width) {
  constexpr int W = kLanes<P>, K = M::kInputs;
  for (int64_t lane = 0; lane < width; lane += W) {
    const int64_t here = max_of<int64_t>(min_of<int64_t>(rows - lane, W), 0);
    const S* first = from + lane * ld;
    int64_t d = 0;
    for (; d + W <= dim / K; d += W) {
      Vec<P> v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        v[r] = r < here ? M::load_packed(first + r * ld + d * K) : splat(P(0));
      transpose<P>(v);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (d + r) * width + lane, v[r]);
    }
    for (; d * K < dim; ++d)
      for (int r = 0; r < W; ++r)
        to[d * width + lane + r] =
            r < here ? M::pack_one(first + r * ld + d * K, dim - d * K) : P(0);
  }
}

// Keys [rows, dim] as panels of 2 W keys, the last one of W if they suffice: that of key j begins
// at j times a key's packed elements.
template <class M, class S>
void pack_keys(const S* from, int64_t ld, int64_t rows, int64_t dim, typename M::P* to) {
  constexpr int W = kLanes<typename M::P>;
  for (int64_t j = 0; j < rows; j += 2 * W) {
    for (int64_t i = j + kRowsAhead; i < min_of(j + kRowsAhead + 2 * W, rows); ++i)
      prefetch_row(from + i * ld, dim);
    pack_panel_of_keys<M>(from + j * ld, ld, min_of<int64_t>(rows - j, 2 * W), dim,
                          to + j * ceil_div(dim, M::kInputs), rows - j > W ? 2 * W : W);
  }
}

// Rows [rows, dim] cut into strips of 2 W columns, the last one of W if they suffice; an element
// packs kInputs rows. The strip of column c starts at data + c * step, and its packed rows are `ld`
// apart, or next to one another where ld is 0.
template <class P>
struct Strips {
  const P* data;
  int64_t step, ld;
};

// Packs them, zeros past the edge, and whole tiles of packed rows where the products want them.
template <class M, class S, class P = typename M::P>
Strips<P> pack_strips(const S* from, int64_t ld, int64_t rows, int64_t dim, P* to) {
  constexpr int W = kLanes<P>, K = M::kInputs;
  const int64_t filled = ceil_div(rows, K), packed = M::kTiles ? round_up(filled, W) : filled;
  for (int64_t c = 0; c < dim; c += 2 * W) {
    const int64_t width = dim - c > W ? 2 * W : W;
    for (int64_t i = filled * width; i < packed * width; i += W)
      store(to + c * packed + i, splat(P(0)));
  }
  for (int64_t j = 0; j < filled; ++j, from += K * ld) {
    for (int64_t i = kRowsAhead; i < min_of<int64_t>(kRowsAhead + K, rows - j * K); ++i)
      prefetch_row(from + i * ld, dim);
    for (int64_t c = 0; c < dim; c += 2 * W) {
      const int64_t width = dim - c > W ? 2 * W : W;
      P* strip = to + c * packed + j * width;
      if constexpr (K == 1) {
        pack_row<M>(from + c, min_of<int64_t>(dim - c, width), strip, width);
      } else {
        const bool both = j * K + 1 < rows;
        int64_t i = 0;
        for (; i < width && c + i + W <= dim; i += W)
          store(strip + i, M::load_rows(from + c + i, ld, both));
        for (; i < width; ++i) {
          S pair[2] = {};
          if (c + i < dim) pair[0] = from[c + i];
          if (c + i < dim && both) pair[1] = from[ld + c + i];
          strip[i] = M::pack_one(pair, 2);
        }
      }
    }
  }
  return {to, packed, 0};
}

// Whether vectors may be read from and written to rows of storage as they are.
template <class S, class A>
bool whole_vectors(int64_t dim) {
  return sizeof(S) == sizeof(A) && dim % kLanes<A> == 0;
}

// ---- register tiles -----------------------------------------------------------------------------

// acc [R, V vectors] += sum over k of a(r, k) b[k], where a(r, k) is a[r * lda + k], or
// a[r + k * lda] if kAcross.
template <class M, bool kAcross, int R, int V, class P = typename M::P>
LK_INLINE void accumulate(const P* a, int64_t lda, const P* b, int64_t ldb, int64_t depth,
                          Vec<typename M::A> (&acc)[R][V]) {
  constexpr int W = kLanes<P>;
  // A pointer for every four rows. Left to itself, the compiler keeps a multiple of lda for each
  // row, more than there are registers.
  constexpr int kPointers = kAcross ? 1 : (R + 3) / 4;
  const P* at[kPointers];
#pragma GCC unroll 6
  for (int i = 0; i < kPointers; ++i) at[i] = a + 4 * i * lda;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec<P> w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = load(b + v * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const P x = kAcross ? at[0][r] : at[r / 4][r % 4 * lda];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = M::add(acc[r][v], w[v], x);
    }
    b += ldb;
#pragma GCC unroll 6
    for (int i = 0; i < kPointers; ++i) {
      at[i] += kAcross ? lda : 1;
      asm("" : "+r"(at[i]));
    }
  }
}

// out [R, V vectors] = multiplier * a [R, depth] b [depth, V vectors]
template <class M, int R, int V, class A = typename M::A, class P = typename M::P>
void tile_of_scores(const P* a, int64_t lda, const P* b, int64_t depth, A multiplier, A* out,
                    int64_t ldo) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
  accumulate<M, false>(a, lda, b, V * W, depth, acc);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v] * multiplier);
}

// out [R, V vectors] (+)= sum over k of a(r, k) b[k], as above; times factors[r] where there are
// any.
template <class M, int R, int V, bool kAcross, class A = typename M::A, class P = typename M::P>
void tile_of_sums(const P* a, int64_t lda, const P* b, int64_t ldb, int64_t depth, A* out,
                  int64_t ldo, bool add, const A* factors) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
  accumulate<M, kAcross>(a, lda, b, ldb, depth, acc);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * W;
      if (factors) {
        store(to, acc[r][v] * factors[r]);
      } else {
        store(to, add ? load(to) + acc[r][v] : acc[r][v]);
      }
    }
}

template <class M, class A = typename M::A, class P = typename M::P>
using ScoreTile = void (*)(const P*, int64_t, const P*, int64_t, A, A*, int64_t);
template <class M, class A = typename M::A, class P = typename M::P>
using SumTile = void (*)(const P*, int64_t, const P*, int64_t, int64_t, A*, int64_t, bool,
                         const A*);

template <class M, int V, int R = V == 1 ? kNarrowRows : kWideRows>
ScoreTile<M> score_tile(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of_scores<M, R, V> : score_tile<M, V, R - 1>(rows);
  }
}
template <class M, int V, bool kAcross, int R = kWideRows>
SumTile<M> sum_tile(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of_sums<M, R, V, kAcross> : sum_tile<M, V, kAcross, R - 1>(rows);
  }
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Register tiles of low_rank_embedding, for one instruction set, and what they do besides.
#pragma once

#include <algorithm>

#include "../low_rank_embedding.h"
#include "block_sparse_parts.h"
#include "embedding_row.h"

namespace lean_kernels {
namespace {

constexpr int64_t kChain = 512;  // of float32 sums: rounding errors grow with the length of a chain

template <class A>
constexpr int64_t kLineOf = 64 / sizeof(A);
template <class A>
constexpr int kStrip = 2 * kLanes<A>;

LK_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// A line more than the features, so that rows do not all fall into the same sets of L1.
template <class A>
int64_t made_stride(int64_t features) {
  return round_up(features, 2 * kStrip<A>) + kLineOf<A>;
}
template <class A>
int64_t padded_rank(int64_t rank) {
  return round_up(rank, kLanes<A>);
}

// A row that is made, and one of the places it goes to.
template <class S, class A>
struct Copy {
  const A* from;
  S* to;
};

// What a tile does besides: nothing.
struct Idle {
  LK_INLINE void step() {}
  LK_INLINE void finish() {}
};

// What a tile does besides: copies of the strips before, spread over its depth. All at once they
// fill the queue of stores, and the processor waits for memory.
template <class A, bool streamed>
struct Copies {
  const Copy<A, A>* next = nullptr;
  const Copy<A, A>* end = nullptr;
  int64_t feature = 0, every = 0, wait = 0;

  Copies() = default;
  Copies(const Copy<A, A>* copies, int64_t count, int64_t o, int64_t depth)
      : next(copies), end(copies + count), feature(o), every(std::max<int64_t>(depth / count, 1)),
        wait(every) {}

  LK_INLINE void copy() {
    write_row<streamed>(next->to + feature, kStrip<A>,
                        [&](int64_t c, auto kind) { return read(kind, next->from + c); });
    ++next;
  }
  LK_INLINE void step() {
    if (--wait != 0 || next == end) return;
    wait = every;
    copy();
  }
  LK_INLINE void finish() {
    while (next != end) copy();
  }
};

// out [R, V vectors] (+)= sums.
template <class A, int R, int V>
LK_INLINE void store_sums(const Vec<A> (&sums)[R][V], bool adds, A* out, int64_t ldo) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * kLanes<A>;
      store(to, adds ? sums[r][v] + load(to) : sums[r][v]);
    }
}

// out [R, V vectors] (+)= x w, x [depth][rows] of unit stride between rows, w [depth][V vectors].
// The first `depth` starts from init, or from 0 without; `adds` keeps what out holds. `side` ends
// before out is written.
template <class A, int R, int V, class Side>
void tile_of(const A* x, int64_t x_step, const A* w, int64_t w_step, int64_t depth, const A* init,
             bool adds, A* out, int64_t ldo, Side side) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = init ? load(init + v * W) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k, x += x_step, w += w_step) {
    Vec<A> wk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) wk[v] = load(w + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A xs = x[r];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += wk[v] * xs;
    }
    side.step();
  }
  side.finish();
  store_sums<A, R, V>(acc, adds, out, ldo);
}

template <class A, class Side = Idle>
using Tile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, const A*, bool, A*, int64_t,
                      Side);

template <class A, int V, class Side = Idle, int R = kWideRows>
Tile<A, Side> tile_for(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of<A, R, V, Side> : tile_for<A, V, Side, R - 1>(rows);
  }
}

// tile_of with x [rows][depth], rows x_row apart.
template <class A, int R, int V>
void rows_tile_of(const A* x, int64_t x_row, const A* w, int64_t w_step, int64_t depth, bool adds,
                  A* out, int64_t ldo) {
  constexpr int W = kLanes<A>, kGroup = 3;  // rows that an address can tell apart
  Vec<A> acc[R][V] = {};
  const A* group[ceil_div(R, kGroup)];
  for (int i = 0; i < ceil_div(R, kGroup); ++i) group[i] = x + i * kGroup * x_row;
  for (int64_t k = 0; k < depth; ++k, w += w_step) {
    Vec<A> wk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) wk[v] = load(w + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A xs = group[r / kGroup][r % kGroup * x_row + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += wk[v] * xs;
    }
  }
  store_sums<A, R, V>(acc, adds, out, ldo);
}

template <class A>
using RowsTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, bool, A*, int64_t);

template <class A, int V, int R = kWideRows>
RowsTile<A> rows_tile_for(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? rows_tile_of<A, R, V> : rows_tile_for<A, V, R - 1>(rows);
  }
}

// tile_of over any depth, in chains.
template <class A, class Side = Idle>
LK_INLINE void multiply(Tile<A, Side> tile, const A* x, int64_t x_step, const A* w, int64_t w_step,
                        int64_t depth, const A* init, bool adds, A* out, int64_t ldo,
                        Side side = {}) {
  for (int64_t k = 0; k < depth; k += kChain, init = nullptr, adds = true, side = {})
    tile(x + k * x_step, x_step, w + k * w_step, w_step, min_of(kChain, depth - k), init, adds, out,
         ldo, side);
}

}  // namespace
}  // namespace lean_kernels

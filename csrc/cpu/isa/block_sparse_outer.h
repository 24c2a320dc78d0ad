// SPDX-License-Identifier: Apache-2.0
// Gradient of the kept blocks: outer products of rows of grad and x, summed.
#pragma once

#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

// Rows [panel_begin, + panel_rows) of grad (panels 0 .. groups) and x (then `inputs` more) as
// [panel][row][block], widened and zero-padded.
template <class S>
void outer_pack(const BlockOuter& p, int64_t begin, int64_t end) {
  using A = typename Accumulator<S>::type;
  for (int64_t i = begin; i < end; ++i) {
    const bool is_grad = i < p.groups;
    const int64_t at = is_grad ? i : i - p.groups;
    const int64_t block = is_grad ? p.block_out : p.block_in;
    const int64_t cols = (is_grad ? p.out_features : p.in_features) - at * block;
    const int64_t ld = is_grad ? p.ldg : p.ldx;
    const S* from = static_cast<const S*>(is_grad ? p.grad : p.x) + p.panel_begin * ld + at * block;
    A* to = static_cast<A*>(is_grad ? p.grad_panels : p.x_panels) + at * p.panel_rows * block;
    pack_panel(from, ld, p.panel_rows, min_of(block, cols), block, to, p.panel_rows);
  }
}

// out [R inputs][V vectors of outputs] (+)= sum over rows of x [row, R] grad [row, V vectors].
template <class A, int R, int V>
void tile_outer(const A* vectors, int64_t ldv, const A* scalars, int64_t lds, int64_t rows, A* out,
                int64_t ldo, bool add) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = add ? load(out + r * ldo + v * W) : splat(A(0));
  for (int64_t m = 0; m < rows; ++m, vectors += ldv, scalars += lds) {
    Vec<A> g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[v] = load(vectors + v * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += g[v] * scalars[r];
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v]);
}

template <class A, int V, int R>
void tile_outer_of_height(int64_t height, const A* vectors, int64_t ldv, const A* scalars,
                          int64_t lds, int64_t rows, A* out, int64_t ldo, bool add) {
  if constexpr (R > 0) {
    if (height == R) return tile_outer<A, R, V>(vectors, ldv, scalars, lds, rows, out, ldo, add);
    tile_outer_of_height<A, V, R - 1>(height, vectors, ldv, scalars, lds, rows, out, ldo, add);
  }
}

// One block of sums, vectors along `lanes`: out[other * out_other + lane * out_lane].
template <class A, int V, int kMaxRows>
void outer_block(const A* vectors, int64_t lanes, const A* scalars, int64_t others, int64_t rows,
                 A* out, int64_t out_other, int64_t out_lane, bool add) {
  constexpr int L = V * kLanes<A>;
  const Panels panels(others, kMaxRows);
  for (int64_t l = 0; l < lanes; l += L)
    for (int64_t i = 0, at = 0, height; i < panels.count; ++i, at += height) {
      height = panels.height + (i < panels.taller);
      A* to = out + at * out_other + l * out_lane;
      if (out_lane == 1) {
        tile_outer_of_height<A, V, kMaxRows>(height, vectors + l, lanes, scalars + at, others, rows,
                                             to, out_other, add);
        continue;
      }
      A tile[kMaxRows * L] = {};
      tile_outer_of_height<A, V, kMaxRows>(height, vectors + l, lanes, scalars + at, others, rows,
                                           tile, L, false);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < L; ++c) {
          A& sum = to[r * out_other + c * out_lane];
          sum = add ? sum + tile[r * L + c] : tile[r * L + c];
        }
    }
}

// Entries [begin, end) of one group.
template <class S>
void outer(const BlockOuter& p, int64_t begin, int64_t end, int64_t group) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const int64_t rows = p.panel_rows, bo = p.block_out, bi = p.block_in;
  const bool add = p.panel_begin > 0;
  const A* grad = static_cast<const A*>(p.grad_panels) + group * rows * bo;
  for (int64_t e = begin; e < end; ++e) {
    const A* x = static_cast<const A*>(p.x_panels) + p.index[e] * rows * bi;
    A* out = static_cast<A*>(p.out) + e * bo * bi;
    if (bo % (2 * W) == 0) {
      outer_block<A, 2, kWideRows>(grad, bo, x, bi, rows, out, p.in_stride, p.out_stride, add);
    } else if (bi % (2 * W) == 0) {
      outer_block<A, 2, kWideRows>(x, bi, grad, bo, rows, out, p.out_stride, p.in_stride, add);
    } else if (bo % W == 0) {
      outer_block<A, 1, kNarrowRows>(grad, bo, x, bi, rows, out, p.in_stride, p.out_stride, add);
    } else if (bi % W == 0) {
      outer_block<A, 1, kNarrowRows>(x, bi, grad, bo, rows, out, p.out_stride, p.in_stride, add);
    } else {
      for (int64_t i = 0; i < bi; ++i)
        for (int64_t o = 0; o < bo; ++o) {
          A& sum = out[o * p.out_stride + i * p.in_stride];
          A total = add ? sum : A(0);
          for (int64_t m = 0; m < rows; ++m) total += grad[m * bo + o] * x[m * bi + i];
          sum = total;
        }
    }
  }
}

}  // namespace
}  // namespace lean_kernels

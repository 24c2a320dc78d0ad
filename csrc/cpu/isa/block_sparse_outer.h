// SPDX-License-Identifier: Apache-2.0
// Gradients of the kept blocks, outer products of rows of grad and x, summed; and of the bias.
#pragma once

#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

constexpr int64_t kOuterRows = 128;  // rows per pass

// Where the parts of the scratch begin, in elements: a group's panel of grad [row][block_out],
// panels of x [column][row][block_in], and which of those are packed.
template <class A>
struct OuterScratch {
  int64_t columns, x, packed;
  size_t bytes;

  explicit OuterScratch(const BlockOuter& p) {
    const int64_t rows = min_of(p.rows, kOuterRows);
    columns = ceil_div(p.in_features, p.block_in);
    x = rows * p.block_out;
    packed = x + columns * rows * p.block_in;
    bytes = (packed + ceil_div(columns, sizeof(A))) * sizeof(A);
  }
};

template <class S>
size_t outer_scratch(const BlockOuter& p) {
  return OuterScratch<typename Accumulator<S>::type>(p).bytes;
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

// One block, from rows of grad [block_out] and x [block_in].
template <class A>
void outer_entry(const BlockOuter& p, const A* grad, const A* x, int64_t rows, A* out, bool add) {
  constexpr int W = kLanes<A>;
  const int64_t bo = p.block_out, bi = p.block_in;
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

// Entries [begin, end). Panels are packed by the task that reads them: fetching what another core
// has just written takes longer.
template <class S>
void outer(const BlockOuter& p, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulator<S>::type;
  const int64_t bo = p.block_out, bi = p.block_in;
  const OuterScratch<A> parts(p);
  A* grad_panel = static_cast<A*>(scratch);
  A* x_panels = grad_panel + parts.x;
  bool* packed = reinterpret_cast<bool*>(grad_panel + parts.packed);
  int64_t first = 0;
  while (p.ptr[first + 1] <= begin) ++first;
  for (int64_t row = 0; row < p.rows; row += kOuterRows) {
    const int64_t rows = min_of(kOuterRows, p.rows - row);
    memset(packed, 0, parts.columns);
    for (int64_t e = begin, g = first; e < end; ++g) {
      const int64_t stop = min_of<int64_t>(end, p.ptr[g + 1]);
      if (e < stop)
        pack_panel(static_cast<const S*>(p.grad) + row * p.ldg + g * bo, p.ldg, rows,
                   min_of(bo, p.out_features - g * bo), bo, grad_panel, rows);
      for (; e < stop; ++e) {
        const int64_t c = p.index[e];
        A* x_panel = x_panels + c * rows * bi;
        if (!packed[c])
          pack_panel(static_cast<const S*>(p.x) + row * p.ldx + c * bi, p.ldx, rows,
                     min_of(bi, p.in_features - c * bi), bi, x_panel, rows);
        packed[c] = true;
        outer_entry(p, grad_panel, x_panel, rows, static_cast<A*>(p.out) + e * bo * bi, row > 0);
      }
    }
  }
}

// A sum of sums over kOuterRows rows each. Where strips lie does not depend on the task.
template <class S>
void column_sums(const void* x, int64_t ld, int64_t rows, int64_t begin, int64_t end, void* sums) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>, V = 4;
  static_assert(kSumColumns % (V * W) == 0);
  for (int64_t c = begin; c < end; c += V * W) {
    const int64_t cols = min_of<int64_t>(V * W, end - c);
    A total[V * W] = {};
    for (int64_t first = 0; first < rows; first += kOuterRows) {
      const S* row = static_cast<const S*>(x) + first * ld + c;
      const int64_t stop = min_of(first + kOuterRows, rows);
      A part[V * W] = {};
      if (cols == V * W) {
        Vec<A> acc[V] = {};
        for (int64_t r = first; r < stop; ++r, row += ld)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[v] += load_wide(row + v * W);
        for (int v = 0; v < V; ++v) store(part + v * W, acc[v]);
      } else {
        for (int64_t r = first; r < stop; ++r, row += ld)
          for (int64_t i = 0; i < cols; ++i) part[i] += widen(row[i]);
      }
      for (int64_t i = 0; i < V * W; ++i) total[i] += part[i];
    }
    memcpy(static_cast<A*>(sums) + c, total, cols * sizeof(A));
  }
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// What the loop nests of block_sparse_linear share: packing into panels, and the epilogue.
#pragma once

#include "../block_sparse_linear.h"
#include "activations.h"
#include "tiles.h"

namespace lean_kernels {
namespace {

// Whether every core keeps all weights in its L2.
template <class S>
bool weights_are_near(const Product& p) {
  constexpr int64_t kNearBytes = 512 << 10;
  return p.w.ptr[p.w.groups] * p.w.block_out * p.w.block_in * int64_t(sizeof(S)) <= kNearBytes;
}

// x rows of one panel as [input block][panel_rows][block_in], widened, columns past the edge zero.
template <class S, class A>
void pack_panel(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t block_in, A* panel,
                int64_t panel_rows) {
  constexpr int W = kLanes<A>;
  if (block_in == 1) {
    int64_t c = 0;
    // W x W at a time, the last rows with some before them; fewer rows, column after column: lanes
    // past the last row are overwritten by the next.
    for (; c + 2 * W <= cols; c += W)
      for (int64_t at = 0; at < rows; at += W) {
        const int64_t first = rows < W ? 0 : min_of(at, rows - W);
        Vec<A> v[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) v[r] = load_wide(x + min_of(first + r, rows - 1) * ldx + c);
        transpose<A>(v);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(panel + (c + i) * panel_rows + first, v[i]);
      }
    for (; c < cols; ++c)
      for (int64_t r = 0; r < rows; ++r) panel[c * panel_rows + r] = widen(x[r * ldx + c]);
    return;
  }
  // All rows of a block after another: their streams together keep more of memory in flight.
  for (int64_t c = 0; c < cols; c += block_in, panel += panel_rows * block_in)
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = x + r * ldx + c;
      A* to = panel + r * block_in;
      const int64_t n = min_of(block_in, cols - c);
      int64_t k = 0;
      for (; k + W <= n; k += W) store(to + k, load_wide(from + k));
      for (; k < n; ++k) to[k] = widen(from[k]);
      for (; k < block_in; ++k) to[k] = 0;
    }
}

// Entries [begin, end) as [strip of outputs][entry][block_in][strip], widened.
template <class S, class A>
void pack_blocks(const BlockMatrix& w, int64_t begin, int64_t end, int64_t strip, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t o = 0; o < w.block_out; o += strip) {
    for (int64_t e = begin; e < end; ++e, to += w.block_in * strip) {
      const S* from = static_cast<const S*>(w.values) +
                      (w.position ? w.position[e] : e) * w.block_stride + o * w.out_stride;
      int64_t i = 0;
      if (w.out_stride == 1 && strip % W == 0) {
        for (; i < w.block_in; ++i)
          for (int64_t c = 0; c < strip; c += W)
            store(to + i * strip + c, load_wide(from + i * w.in_stride + c));
      } else if (w.in_stride == 1 && strip % W == 0) {
        for (; i + W <= w.block_in; i += W)
          for (int64_t c = 0; c < strip; c += W) {
            Vec<A> v[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) v[r] = load_wide(from + (c + r) * w.out_stride + i);
            transpose<A>(v);
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) store(to + (i + r) * strip + c, v[r]);
          }
      }
      for (; i < w.block_in; ++i)
        for (int64_t c = 0; c < strip; ++c)
          to[i * strip + c] = widen(from[c * w.out_stride + i * w.in_stride]);
    }
  }
}

LK_INLINE int64_t padded_inputs(const Product& p) {
  return ceil_div(p.in_features, p.w.block_in) * p.w.block_in;
}

// Columns [0, kAcross vectors) of a tile; `cols` of them exist in the output.
template <int kActivation, int kAcross, class S, class A>
LK_INLINE void finish_columns(const A* tile, int64_t ldt, int rows, int64_t cols,
                              const S* residual, int64_t ldr, S* y, int64_t ldy) {
  constexpr int W = kLanes<A>, kDown = kMany / kAcross;
  for (int row = 0; row < rows; row += kDown) {
    // Rows past the last repeat it.
    const auto row_of = [&](int i) { return min_of(row + i / kAcross, rows - 1); };
    const Many<A> v = activate<kActivation>(
        map<A>([&](int i) { return load(tile + row_of(i) * ldt + i % kAcross * W); }));
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) {
      const int64_t left = cols - i % kAcross * W;
      const S* add = residual ? residual + row_of(i) * ldr + i % kAcross * W : nullptr;
      S* to = y + row_of(i) * ldy + i % kAcross * W;
      if (left >= W) {
        store_narrow(to, add ? v.v[i] + load_wide(add) : v.v[i]);
      } else {
        A lanes[W];
        store(lanes, v.v[i]);
        for (int64_t c = 0; c < W && c < left; ++c)
          narrow(add ? lanes[c] + widen(add[c]) : lanes[c], to + c);
      }
    }
  }
}

template <int kActivation, class S, class A>
void finish_as(const A* tile, int64_t ldt, int rows, int64_t cols, const S* residual, int64_t ldr,
               S* y, int64_t ldy) {
  constexpr int W = kLanes<A>;
  if (ldt == 2 * W)
    return finish_columns<kActivation, 2>(tile, ldt, rows, cols, residual, ldr, y, ldy);
  for (int64_t c = 0; c < cols; c += W)
    finish_columns<kActivation, 1>(tile + c, ldt, rows, min_of<int64_t>(W, cols - c),
                                   residual ? residual + c : nullptr, ldr, y + c, ldy);
}

// Applies activation and residual to a tile of sums (padded to whole vectors) and writes it out.
template <class S, class A>
void finish(int activation, const A* tile, int64_t ldt, int rows, int64_t cols, const S* residual,
            int64_t ldr, S* y, int64_t ldy) {
  switch (activation) {
    case kRelu: return finish_as<kRelu>(tile, ldt, rows, cols, residual, ldr, y, ldy);
    case kGelu: return finish_as<kGelu>(tile, ldt, rows, cols, residual, ldr, y, ldy);
    case kGeluTanh: return finish_as<kGeluTanh>(tile, ldt, rows, cols, residual, ldr, y, ldy);
    case kSilu: return finish_as<kSilu>(tile, ldt, rows, cols, residual, ldr, y, ldy);
    case kElu: return finish_as<kElu>(tile, ldt, rows, cols, residual, ldr, y, ldy);
    default: return finish_as<kIdentity>(tile, ldt, rows, cols, residual, ldr, y, ldy);
  }
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// The inner loops of block_sparse_linear, for one instruction set.
//
// Every output is a sum over its group's entries in order, and over the inputs of a block in order,
// started from the bias, whatever the height of the tile it is computed in: a row's result depends
// neither on the rest of the batch nor on threads.
#pragma once

#include "../block_sparse_linear.h"
#include "activations.h"
#include "tiles.h"

namespace lean_kernels {
namespace {

// ---- epilogue ---------------------------------------------------------------------------------

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
        for (int64_t c = 0; c < left; ++c)
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
    default: return finish_as<kIdentity>(tile, ldt, rows, cols, residual, ldr, y, ldy);
  }
}

// ---- lanes along outputs: block_out is a multiple of the vector -------------------------------

// One group's entries, as the tiles read them.
template <class A>
struct Entries {
  const int32_t* index;
  const int32_t* position;  // null: weights lie in entry order
  int64_t count;
  const A* w;  // [entry][block_in][...], outputs contiguous
  int64_t w_block, w_in;
  int64_t block_in, inputs;
  bool first_use;  // of these weights: they may be far away
};

// Inputs one chain of float32 sums runs over before it is added to the total: rounding errors of
// a chain grow with its length.
constexpr int64_t kChainInputs = 1024;

// out [R, V vectors] = init + sum over entries of x [R, block_in] w [block_in, V vectors].
// x: panel [input block][R][block_in].
template <class A, int R, int V, int kBlockIn>
void tile_lanes_out(const Entries<A>& e, const A* x, const Vec<A>* init, A* out, int64_t ldo) {
  constexpr int W = kLanes<A>;
  const int64_t block_in = kBlockIn ? kBlockIn : e.block_in;
  const int64_t w_in = e.w_in;
  const int64_t chain = kChainInputs > block_in ? kChainInputs / block_in : 1;
  // Ask early for what no hardware prefetcher foresees: weights on the next pages (on their first
  // use), inputs of the next block or, at the end, of the next panel.
  int64_t i = 0;
  do {
    Vec<A> acc[R][V];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = i ? splat(A(0)) : init[v];
    const bool first = i == 0;
    const int64_t stop = min_of(i + chain, e.count);
    for (; i < stop; ++i) {
      const A* xb = x + e.index[i] * (R * block_in);
      const A* wb = e.w + (e.position ? e.position[i] : i) * e.w_block;
      if constexpr (kBlockIn != 1) {
        const A* next = i + 1 < e.count ? x + e.index[i + 1] * (R * block_in)
                                        : x + R * e.inputs + e.index[0] * (R * block_in);
        for (int64_t k = 0; k < R * block_in; k += 64 / sizeof(A)) __builtin_prefetch(next + k);
        if (e.first_use)
          for (int64_t k = 0; k < block_in; ++k)
            __builtin_prefetch(wb + 2 * e.w_block + k * e.w_in);
      }
#pragma GCC unroll 8
      for (int64_t k = 0; k < block_in; ++k) {
        const A* wk = wb + k * w_in;
        Vec<A> w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = load(wk + v * W);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
          A xs = xb[r * block_in + k];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[r][v] += w[v] * xs;
        }
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        A* to = out + r * ldo + v * W;
        store(to, first ? acc[r][v] : acc[r][v] + load(to));
      }
  } while (i < e.count);
}

template <class A>
using TileLanesOut = void (*)(const Entries<A>&, const A*, const Vec<A>*, A*, int64_t);

template <class A, int V, int kBlockIn, int R>
TileLanesOut<A> tile_of_height(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_lanes_out<A, R, V, kBlockIn>
                     : tile_of_height<A, V, kBlockIn, R - 1>(rows);
  }
}
template <class A, int V, int R>
TileLanesOut<A> tile_for(int64_t rows, int64_t block_in) {
  switch (block_in) {
    case 1: return tile_of_height<A, V, 1, R>(rows);
    case 16: return tile_of_height<A, V, 16, R>(rows);
    case 32: return tile_of_height<A, V, 32, R>(rows);
    case 64: return tile_of_height<A, V, 64, R>(rows);
    default: return tile_of_height<A, V, 0, R>(rows);
  }
}

// x rows of one panel as [input block][panel_rows][block_in], widened, columns past the edge zero.
template <class S, class A>
void pack_panel(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t block_in, A* panel,
                int64_t panel_rows) {
  constexpr int W = kLanes<A>;
  if (block_in == 1) {
    int64_t c = 0;
    // Whole vectors, column after column: lanes past the last row are overwritten by the next.
    for (; rows <= W && c + 2 * W <= cols; c += W) {
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) v[r] = load_wide(x + min_of<int64_t>(r, rows - 1) * ldx + c);
      transpose<A>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(panel + (c + i) * panel_rows, v[i]);
    }
    for (; c < cols; ++c)
      for (int64_t r = 0; r < rows; ++r) panel[c * panel_rows + r] = widen(x[r * ldx + c]);
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    A* to = panel + r * block_in;
    for (int64_t c = 0; c < cols; c += block_in, to += panel_rows * block_in) {
      int64_t n = min_of(block_in, cols - c), k = 0;
      for (; k + W <= n; k += W) store(to + k, load_wide(x + c + k));
      for (; k < n; ++k) to[k] = widen(x[c + k]);
      for (; k < block_in; ++k) to[k] = 0;
    }
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

template <class S>
bool packs_blocks(const Product& p) {
  return sizeof(S) != sizeof(typename Accumulator<S>::type) || p.w.out_stride != 1;
}

template <class S, int V, int kMaxRows>
void product_lanes_out(const Product& p, const Range& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>, kStrip = V * W;
  constexpr int kThin = 3;  // panels this thin take wider strips: more chains in flight
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const Panels panels(rows, kMaxRows);
  const bool packs = packs_blocks<S>(p);
  A* xs = static_cast<A*>(scratch);
  A* packed = xs + rows * inputs;
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  for (int64_t i = 0, at = 0; i < panels.count; ++i) {
    const int64_t height = panels.height + (i < panels.taller);
    pack_panel(x + at * p.ldx, p.ldx, height, p.in_features, w.block_in, xs + at * inputs, height);
    at += height;
  }
  const bool thin = rows <= kThin && w.block_out % (4 * W) == 0;
  const int64_t strip = thin ? 4 * W : kStrip;
  const auto tile_of = [&](int64_t height) {
    return thin ? tile_for<A, 4, kThin>(height, w.block_in)
                : tile_for<A, V, kMaxRows>(height, w.block_in);
  };
  const TileLanesOut<A> run_taller = tile_of(panels.height + 1), run_rest = tile_of(panels.height);
  A tile[kMaxRows * kStrip > kThin * 4 * W ? kMaxRows * kStrip : kThin * 4 * W];

  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g], end = w.ptr[g + 1];
    Entries<A> e{w.index + begin, nullptr, end - begin, packed, w.block_in * strip,
                 strip, w.block_in, inputs, false};
    const int64_t next_strip = packs ? e.count * e.w_block : strip;
    if (packs) {
      pack_blocks<S>(w, begin, end, strip, packed);
    } else {
      e.position = w.position ? w.position + begin : nullptr;
      e.w = static_cast<const A*>(w.values) + (w.position ? 0 : begin * w.block_stride);
      e.w_block = w.block_stride;
      e.w_in = w.in_stride;
    }
    for (int64_t o = 0; o < w.block_out; o += strip, e.w += next_strip) {
      const int64_t out = g * w.block_out + o, cols = min_of(strip, p.out_features - out);
      if (cols <= 0) break;
      A bias[4 * W > kStrip ? 4 * W : kStrip] = {};
      if (p.bias)
        for (int64_t c = 0; c < cols; ++c) bias[c] = widen(static_cast<const S*>(p.bias)[out + c]);
      Vec<A> init[4];
      for (int v = 0; v < strip / W; ++v) init[v] = load(bias + v * W);
      const bool direct = sizeof(S) == sizeof(A) && cols == strip && !p.activation && !p.residual;
      for (int64_t i = 0, at = 0; i < panels.count; ++i) {
        const bool taller = i < panels.taller;
        const int64_t height = panels.height + taller, row = t.row_begin + at;
        const TileLanesOut<A> run = taller ? run_taller : run_rest;
        const A* panel = xs + at * inputs;
        S* y = static_cast<S*>(p.y) + row * p.ldy + out;
        e.first_use = i == 0 && !packs;
        at += height;
        // The next tile's output lines: the panel below, or the first one of the next strip.
        const S* ahead =
            i + 1 < panels.count ? y + height * p.ldy : y + strip - (at - height) * p.ldy;
        for (int64_t r = 0; r < height; ++r) __builtin_prefetch(ahead + r * p.ldy, 1);
        if (direct) {
          run(e, panel, init, reinterpret_cast<A*>(y), p.ldy);
          continue;
        }
        const S* residual = p.residual ? static_cast<const S*>(p.residual) + row * p.ldr + out
                                       : nullptr;
        if (residual)
          for (int64_t r = 0; r < height; ++r) __builtin_prefetch(residual + r * p.ldr);
        run(e, panel, init, tile, strip);
        finish(p.activation, tile, strip, int(height), cols, residual, p.ldr, y, p.ldy);
      }
    }
  }
}

// ---- few outputs per block: W rows of x at a time, one output after the other -------------------

// a and b folded into one vector: where `step` is set in a lane's number come sums of b's pairs of
// lanes `step` apart, elsewhere those of a's.
template <int step, class A, int... lane>
LK_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  return __builtin_shufflevector(a, b, ((lane & step ? W : 0) + (lane & ~step))...) +
         __builtin_shufflevector(a, b, ((lane & step ? W : 0) + (lane | step))...);
}

// Adds up the lanes of W vectors, always by the same tree: lane i of the result is the sum of v[i].
template <class A, int step = 1>
LK_INLINE Vec<A> sum_lanes(Vec<A> (&v)[kLanes<A>]) {
  constexpr int W = kLanes<A>;
  if constexpr (step == W) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W / (2 * step); ++i)
      v[i] = fold<step, A>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>());
    return sum_lanes<A, 2 * step>(v);
  }
}

// out [W rows] = sum over entries of x [R, block_in] w [block_in], lanes along block_in, which is a
// multiple of W. x: panel [input block][W rows][block_in]; rows from R on are zero.
template <class A, int R, int kBlockIn>
void tile_lanes_in(const Entries<A>& e, const A* x, A* out) {
  constexpr int W = kLanes<A>;
  const int64_t block_in = kBlockIn ? kBlockIn : e.block_in;
  Vec<A> acc[W] = {};
  for (int64_t i = 0; i < e.count; ++i) {
    const A* xb = x + e.index[i] * (W * block_in);
    const A* wb = e.w + (e.position ? e.position[i] : i) * e.w_block;
#pragma GCC unroll 2
    for (int64_t k = 0; k < block_in; k += W) {
      const Vec<A> w = load(wb + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r] += load(xb + r * block_in + k) * w;
    }
  }
  store(out, sum_lanes<A>(acc));
}

// The same for any block_in, lanes along rows. x: panel [input][W rows]. Sums over inputs run in
// eight chains, so that they need not wait for each multiply-add.
template <class A>
void tile_lanes_rows(const Entries<A>& e, const A* x, A* out) {
  constexpr int W = kLanes<A>, kChains = 8;
  Vec<A> acc[kChains] = {};
  for (int64_t i = 0; i < e.count; ++i) {
    const A* xb = x + e.index[i] * (W * e.block_in);
    const A* wb = e.w + (e.position ? e.position[i] : i) * e.w_block;
    int64_t k = 0;
    for (; k + kChains <= e.block_in; k += kChains)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c)
        acc[c] += load(xb + (k + c) * W) * wb[(k + c) * e.w_in];
    for (; k < e.block_in; ++k) acc[0] += load(xb + k * W) * wb[k * e.w_in];
  }
#pragma GCC unroll 8
  for (int c = 1; c < kChains; ++c) acc[0] += acc[c];
  store(out, acc[0]);
}

template <class A>
using TileOneOutput = void (*)(const Entries<A>&, const A*, A*);

template <class A, int kBlockIn>
TileOneOutput<A> tile_lanes_in_for(int64_t rows) {
  constexpr int W = kLanes<A>;
  if (rows == 1) return tile_lanes_in<A, 1, kBlockIn>;
  return 2 * rows <= W ? tile_lanes_in<A, W / 2, kBlockIn> : tile_lanes_in<A, W, kBlockIn>;
}
template <class A>
TileOneOutput<A> tile_one_output(int64_t rows, int64_t block_in) {
  if (block_in % kLanes<A> != 0) return tile_lanes_rows<A>;
  return block_in == 16 ? tile_lanes_in_for<A, 16>(rows) : tile_lanes_in_for<A, 0>(rows);
}

// x rows of one panel as [inputs][W], rows and columns past the edge zero.
template <class S, class A>
void pack_panel_transposed(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t inputs,
                           A* panel) {
  constexpr int W = kLanes<A>;
  for (int64_t k = 0; k < inputs; ++k)
    for (int64_t r = 0; r < W; ++r)
      panel[k * W + r] = r < rows && k < cols ? A(widen(x[r * ldx + k])) : A(0);
}

constexpr int64_t kStripBytes = 128 << 10;  // weights one pass over the panels keeps in L2

// The matrix with outputs and inputs of each block swapped, for packing inputs fastest.
LK_INLINE BlockMatrix swapped(BlockMatrix w) {
  const BlockMatrix from = w;
  w.block_out = from.block_in, w.block_in = from.block_out;
  w.out_stride = from.in_stride, w.in_stride = from.out_stride;
  return w;
}

template <class S>
void product_one_output(const Product& p, const Range& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>, kOutputs = 2 * W;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const int64_t block = w.block_in * w.block_out;
  const bool lanes_in = w.block_in % W == 0;
  const bool packs = sizeof(S) != sizeof(A) || (lanes_in && w.in_stride != 1);
  A* xs = static_cast<A*>(scratch);
  A* packed = xs + ceil_div(rows, W) * W * inputs;
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t height = min_of<int64_t>(W, rows - r);
    A* panel = xs + r * inputs;
    if (lanes_in) {
      if (height < W) memset(panel, 0, W * inputs * sizeof(A));
      pack_panel(x + r * p.ldx, p.ldx, height, p.in_features, w.block_in, panel, W);
    } else {
      pack_panel_transposed(x + r * p.ldx, p.ldx, height, p.in_features, inputs, panel);
    }
  }

  A sums[kOutputs * W], tile[W * kOutputs];
  int64_t strip_begin = t.group_begin;
  while (strip_begin < t.group_end) {
    int64_t strip_end = strip_begin + 1;
    while (strip_end < t.group_end &&
           (w.ptr[strip_end + 1] - w.ptr[strip_begin]) * block * int64_t(sizeof(A)) <= kStripBytes)
      ++strip_end;
    const int64_t base = w.ptr[strip_begin];
    if (packs) pack_blocks<S>(swapped(w), base, w.ptr[strip_end], w.block_in, packed);
    const int64_t strip_outputs =
        min_of(strip_end * w.block_out, p.out_features) - strip_begin * w.block_out;
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t row = t.row_begin + r, height = min_of<int64_t>(W, rows - r);
      const TileOneOutput<A> run = tile_one_output<A>(height, w.block_in);
      for (int64_t done = 0; done < strip_outputs; done += kOutputs) {
        const int64_t first = strip_begin * w.block_out + done;
        const int64_t outputs = min_of<int64_t>(kOutputs, strip_outputs - done);
        for (int64_t n = 0; n < outputs; ++n) {
          const int64_t g = (first + n) / w.block_out, o = (first + n) % w.block_out;
          const int64_t begin = w.ptr[g];
          Entries<A> e{w.index + begin, nullptr, w.ptr[g + 1] - begin, nullptr, block, 1,
                       w.block_in,      0,       false};
          if (packs) {
            e.w = packed + (begin - base) * block + o * w.block_in;
          } else {
            e.position = w.position ? w.position + begin : nullptr;
            e.w = static_cast<const A*>(w.values) + o * w.out_stride +
                  (w.position ? 0 : begin * w.block_stride);
            e.w_block = w.block_stride, e.w_in = w.in_stride;
          }
          run(e, xs + r * inputs, sums + n * W);
          if (p.bias) {
            const A bias = widen(static_cast<const S*>(p.bias)[first + n]);
            store(sums + n * W, load(sums + n * W) + bias);
          }
        }
        for (int64_t n = 0; n < outputs; ++n)
          for (int64_t i = 0; i < height; ++i) tile[i * kOutputs + n] = sums[n * W + i];
        const S* residual = static_cast<const S*>(p.residual);
        finish(p.activation, tile, kOutputs, int(height), outputs,
               residual ? residual + row * p.ldr + first : nullptr, p.ldr,
               static_cast<S*>(p.y) + row * p.ldy + first, p.ldy);
      }
    }
    strip_begin = strip_end;
  }
}

// ---- choice of loop nest: by block shape alone, so that it is the same for every batch ----------

template <class S>
void product(const Product& p, const Range& t, void* scratch) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  if (p.w.block_out % (2 * W) == 0) return product_lanes_out<S, 2, kWideRows>(p, t, scratch);
  if (p.w.block_out % W == 0) return product_lanes_out<S, 1, kNarrowRows>(p, t, scratch);
  return product_one_output<S>(p, t, scratch);
}

// Rows a task should hold a multiple of: the lanes of a panel, where rows are the lanes.
template <class S>
int64_t product_row_unit(const Product& p) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  return p.w.block_out % W == 0 ? 1 : W;
}

template <class S>
size_t product_scratch(const Product& p, int64_t rows) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const int64_t block = p.w.block_in * p.w.block_out;
  const int64_t strip = p.max_entries * block + kStripBytes / int64_t(sizeof(A));
  int64_t size = ceil_div(rows, W) * W * padded_inputs(p);
  if (packs_blocks<S>(p) || p.w.block_out % W != 0) size += strip;
  return size_t(size) * sizeof(A);
}

// ---- gradient of the kept blocks ---------------------------------------------------------------

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

template <class S>
constexpr BlockSparseKernels block_sparse_kernels() {
  return {product_row_unit<S>, product_scratch<S>, product<S>, outer_pack<S>, outer<S>};
}

// Multiply-adds on as many independent accumulators as hide their latency; returns the FLOP done.
double fma_peak(int64_t iterations) {
  constexpr int kChains = 10;
  Vec<float> acc[kChains] = {}, scale = splat(0.999f);
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) {
      acc[c] = acc[c] * scale + scale;
#if defined(__AVX512F__)
      asm volatile("" : "+v"(acc[c]));
#elif defined(__x86_64__)
      asm volatile("" : "+x"(acc[c]));
#else
      asm volatile("" : "+w"(acc[c]));
#endif
    }
  return 2.0 * kChains * kLanes<float> * double(iterations);
}

}  // namespace
}  // namespace lean_kernels

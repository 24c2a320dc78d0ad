// SPDX-License-Identifier: Apache-2.0
// Products with lanes along outputs: block_out is a multiple of the vector.
#pragma once

#include "bfloat16_pairs.h"
#include "multiply_add.h"

namespace lean_kernels {
namespace {

// One group's entries, as the tiles read them; block_in and inputs count elements of type P.
template <class P>
struct Entries {
  const int32_t* index;
  const int32_t* position;  // null: weights lie in entry order
  int64_t count;
  const P* w;  // [entry][block_in][...], outputs contiguous
  int64_t w_block, w_in;
  int64_t block_in, inputs;
};

constexpr int kStep = 8;  // inputs a tile multiplies between prefetches
constexpr int64_t kMostAhead = 2 * kStep;

// Memory wanted later, of which each step of a tile asks for some lines: all at once would leave
// its own loads waiting.
struct Ahead {
  const char* weights = nullptr;
  int64_t lines = 0;
  // Rows of the next tile, each of so many bytes; strides in bytes too.
  const char *y = nullptr, *residual = nullptr;
  int64_t ldy = 0, ldr = 0, width = 0, rows = 0, rows_per_step = 0;

  LK_INLINE void ask_rows() {
    for (int64_t r = 0; r < rows_per_step && rows > 0; ++r, --rows, y += ldy) {
#pragma GCC unroll 1
      for (int64_t at = 0; at < width; at += 64) __builtin_prefetch(y + at, 1);
      if (!residual) continue;
#pragma GCC unroll 1
      for (int64_t at = 0; at < width; at += 64) __builtin_prefetch(residual + at);
      residual += ldr;
    }
  }
};

// Inputs one chain of float32 sums runs over before it is added to the total: rounding errors of
// a chain grow with its length.
constexpr int64_t kChainInputs = 1024;

// out [R, V vectors] = init + sum over entries of x [R, block_in] w [block_in, V vectors].
// x: panel [inputs / D][R][D].
template <class M, int R, int V, int D, bool kOneInput, class A = typename M::A,
          class P = typename M::P>
void tile_lanes_out(const Entries<P>& e, const P* x, const Vec<A>* init, A* out, int64_t ldo,
                    Ahead& ahead) {
  constexpr int W = kLanes<A>, kChain = kChainInputs / M::kInputs, kUnrolled = D > 1 ? kStep : 1;
  const int64_t block_in = kOneInput ? 1 : e.block_in;
  const int64_t w_in = e.w_in;
  const int64_t chain = kChain > block_in ? kChain / block_in : 1;
  const char* weights = ahead.weights;
  const int64_t lines = ahead.lines;
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
      const P* xb = x + e.index[i] * (R * block_in);
      const P* wb = e.w + (e.position ? e.position[i] : i) * e.w_block;
      // No hardware prefetcher foresees the next block of x or, at the end, of the next panel.
      const P* next = i + 1 < e.count ? x + e.index[i + 1] * (R * block_in)
                                      : x + R * e.inputs + e.index[0] * (R * block_in);
#pragma GCC unroll 1
      for (int64_t k = 0; k < block_in; k += D, xb += R * D)
#pragma GCC unroll 1
        for (int step = 0; step < D; step += kStep, wb += kUnrolled * w_in) {
          if constexpr (D > 1) {
#pragma GCC unroll 16
            for (int at = 0; at < R * kStep; at += 64 / sizeof(P)) __builtin_prefetch(next + at);
            next += R * kStep;
#pragma GCC unroll 1
            for (int64_t l = 0; l < lines; ++l, weights += 64) __builtin_prefetch(weights, 0, 2);
            if (ahead.rows > 0) ahead.ask_rows();
          }
#pragma GCC unroll 8
          for (int d = 0; d < kUnrolled; ++d) {
            Vec<P> w[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) w[v] = load(wb + d * w_in + v * W);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
              const P xs = xb[r * D + step + d];
#pragma GCC unroll 4
              for (int v = 0; v < V; ++v) acc[r][v] = M::add(acc[r][v], w[v], xs);
            }
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
  ahead.weights = weights;
}

template <class M>
using TileLanesOut = void (*)(const Entries<typename M::P>&, const typename M::P*,
                              const Vec<typename M::A>*, typename M::A*, int64_t, Ahead&);

template <class M, int V, int D, bool kOneInput, int R>
TileLanesOut<M> tile_of_height(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_lanes_out<M, R, V, D, kOneInput>
                     : tile_of_height<M, V, D, kOneInput, R - 1>(rows);
  }
}
template <class M, int V, int R>
TileLanesOut<M> tile_for(int64_t rows, int64_t block_in) {
  if (block_in % M::kDepth == 0) return tile_of_height<M, V, M::kDepth, false, R>(rows);
  return block_in == 1 ? tile_of_height<M, V, 1, true, R>(rows)
                       : tile_of_height<M, V, 1, false, R>(rows);
}

template <class S>
bool packs_blocks(const Product& p) {
  return sizeof(S) != sizeof(typename Accumulator<S>::type) || p.w.out_stride != 1;
}

// Elements of scratch: panels of x, and a group's packed weights.
template <class S>
int64_t lanes_out_scratch(const Product& p, int64_t rows) {
  const int64_t weights = p.max_entries * p.w.block_in * p.w.block_out;
  return rows * padded_inputs(p) + (packs_blocks<S>(p) ? weights : 0);
}

template <class S, class M, int V, int kMaxRows>
void product_lanes_out(const Product& p, const Range& t, void* scratch) {
  using A = typename M::A;
  using P = typename M::P;
  constexpr int W = kLanes<A>, kStrip = V * W;
  constexpr int kThin = 3;  // panels this thin take wider strips: more chains in flight
  const BlockMatrix& w = p.w;
  const int64_t block_in = w.block_in / M::kInputs, inputs = padded_inputs(p) / M::kInputs;
  const int64_t rows = t.row_end - t.row_begin;
  const Panels panels(rows, kMaxRows);
  const bool packs = packs_blocks<S>(p), near = weights_are_near<S>(p);
  P* xs = static_cast<P*>(scratch);
  P* packed = xs + rows * inputs;
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  const int64_t depth = block_in % M::kDepth == 0 ? M::kDepth : 1;
  const int64_t packed_inputs = ceil_div(p.in_features, depth * M::kInputs) * depth;
  for (int64_t i = 0, at = 0; i < panels.count; ++i) {
    const int64_t height = panels.height + (i < panels.taller);
    P* panel = xs + at * inputs;
    pack_panel(x + at * p.ldx, p.ldx, height, p.in_features, depth * M::kInputs, panel, height);
    memset(panel + packed_inputs * height, 0, (inputs - packed_inputs) * height * sizeof(P));
    at += height;
  }
  const bool thin = rows <= kThin && w.block_out % (4 * W) == 0;
  const int64_t strip = thin ? 4 * W : kStrip;
  const auto tile_of = [&](int64_t height) {
    return thin ? tile_for<M, 4, kThin>(height, block_in)
                : tile_for<M, V, kMaxRows>(height, block_in);
  };
  const TileLanesOut<M> run_taller = tile_of(panels.height + 1), run_rest = tile_of(panels.height);
  A tile[kMaxRows * kStrip > kThin * 4 * W ? kMaxRows * kStrip : kThin * 4 * W];

  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g], end = w.ptr[g + 1];
    Entries<P> e{w.index + begin, nullptr, end - begin, packed, block_in * strip,
                 strip, block_in, inputs};
    const int64_t next_strip = packs ? e.count * e.w_block : strip;
    if (packs) {
      pack_blocks<S>(w, begin, end, strip, packed);
    } else {
      e.position = w.position ? w.position + begin : nullptr;
      e.w = static_cast<const P*>(w.values) + (w.position ? 0 : begin * w.block_stride);
      e.w_block = w.block_stride;
      e.w_in = w.in_stride;
    }
    Ahead ahead;
    ahead.ldy = p.ldy * sizeof(S), ahead.ldr = p.ldr * sizeof(S), ahead.width = strip * sizeof(S);
    const int64_t steps = depth > 1 ? e.count * block_in / kStep : 1;  // of a tile
    // The next group's weights, into L2.
    if (depth > 1 && g + 1 < t.group_end && !w.position && !near && steps) {
      const int64_t bytes = (w.ptr[g + 2] - end) * w.block_stride * int64_t(sizeof(S));
      const int64_t tiles = panels.count * ceil_div(w.block_out, strip);
      ahead.weights =
          static_cast<const char*>(w.values) + end * w.block_stride * int64_t(sizeof(S));
      ahead.lines = min_of<int64_t>(ceil_div(bytes, 64 * steps * tiles), kMostAhead);
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
        const TileLanesOut<M> run = taller ? run_taller : run_rest;
        const P* panel = xs + at * inputs;
        S* y = static_cast<S*>(p.y) + row * p.ldy + out;
        at += height;
        const S* residual = p.residual ? static_cast<const S*>(p.residual) + row * p.ldr + out
                                       : nullptr;
        // The next tile is the panel below, or the first one of the next strip.
        const bool below = i + 1 < panels.count;
        const auto next_tile = [&](const S* from, int64_t ld) {
          return reinterpret_cast<const char*>(from + (below ? height * ld
                                                             : strip - (at - height) * ld));
        };
        ahead.y = next_tile(y, p.ldy);
        ahead.residual = residual ? next_tile(residual, p.ldr) : nullptr;
        ahead.rows = height, ahead.rows_per_step = steps ? ceil_div(height, steps) : 0;
        if (depth == 1) ahead.ask_rows();
        if (direct) {
          run(e, panel, init, reinterpret_cast<A*>(y), p.ldy, ahead);
          continue;
        }
        run(e, panel, init, tile, strip, ahead);
        finish(p.activation, tile, strip, int(height), cols, residual, p.ldr, y, p.ldy);
      }
    }
  }
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Products with few outputs per block: a vector of rows of x at a time.
#pragma once

#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

// A matrix as the sums read it. Element (o, i) of entry e is
// values[at(e) * block_stride + o * out_stride + i * in_stride], at(e) = position[e] or e.
template <class A>
struct Weights {
  const A* values;
  const int32_t* ptr;
  const int32_t* index;
  const int32_t* position;
  int64_t block_out, block_in;
  int64_t block_stride, out_stride, in_stride;

  LK_INLINE const A* block(int64_t e, int64_t o) const {
    return values + (position ? position[e] : e) * block_stride + o * out_stride;
  }
};

// Writes W sums [O outputs][W / O rows] to sums [output][W rows].
template <int O, class A>
LK_INLINE void put_sums(Vec<A> v, A* sums) {
  constexpr int W = kLanes<A>, R = W / O;
  if constexpr (O == 1) {
    store(sums, v);
  } else {
    A lanes[W];
    store(lanes, v);
    for (int o = 0; o < O; ++o) memcpy(sums + o * W, lanes + o * R, R * sizeof(A));
  }
}

// sums [output][W rows] = x [W rows, inputs] Wᵀ of the groups [begin, end), lanes along block_in,
// which is a multiple of W. O outputs at once read the same x; R rows of theirs are computed.
// x: panel [input block][W rows][block_in]; rows from `rows` on are zero.
template <class A, int O, int R, int kBlockIn>
void sum_lanes_in(const Weights<A>& w, int64_t begin, int64_t end, const A* x, int64_t rows,
                  A* sums) {
  constexpr int W = kLanes<A>;
  const int64_t block_in = kBlockIn ? kBlockIn : w.block_in;
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = w.ptr[g], last = w.ptr[g + 1];
    for (int64_t o = 0; o < w.block_out; o += O, sums += O * W)
      for (int64_t r = 0; r < rows; r += W / O) {
        Vec<A> acc[W] = {};
        for (int64_t e = first; e < last; ++e) {
          const A* xb = x + (int64_t(w.index[e]) * W + r) * block_in;
          const A* wb = w.block(e, o);
#pragma GCC unroll 2
          for (int64_t k = 0; k < block_in; k += W)
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
              const Vec<A> xs = load(xb + i * block_in + k);
#pragma GCC unroll 4
              for (int j = 0; j < O; ++j)
                acc[j * (W / O) + i] += xs * load(wb + j * w.out_stride + k);
            }
        }
        put_sums<O, A>(reduce_lanes<A>(acc, [](Vec<A> a, Vec<A> b) { return a + b; }), sums + r);
      }
  }
}

// The same for any block_in, lanes along rows. x: panel [input][W rows]. Sums over inputs run in
// eight chains, so that they need not wait for each multiply-add.
template <class A>
void sum_lanes_rows(const Weights<A>& w, int64_t begin, int64_t end, const A* x, int64_t, A* sums) {
  constexpr int W = kLanes<A>, kChains = 8;
  for (int64_t g = begin; g < end; ++g)
    for (int64_t o = 0; o < w.block_out; ++o, sums += W) {
      Vec<A> acc[kChains] = {};
      for (int64_t e = w.ptr[g]; e < w.ptr[g + 1]; ++e) {
        const A* xb = x + w.index[e] * (W * w.block_in);
        const A* wb = w.block(e, o);
        int64_t k = 0;
        for (; k + kChains <= w.block_in; k += kChains)
#pragma GCC unroll 8
          for (int c = 0; c < kChains; ++c)
            acc[c] += load(xb + (k + c) * W) * wb[(k + c) * w.in_stride];
        for (; k < w.block_in; ++k) acc[0] += load(xb + k * W) * wb[k * w.in_stride];
      }
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) acc[0] += acc[c];
      store(sums, acc[0]);
    }
}

#if defined(__AVX512F__)
constexpr int kHeld = 16;   // inputs multiplied at once
constexpr int kAtOnce = 4;  // outputs added to at once
constexpr int kChains = 4;  // of an output's sum: each takes its quarter of kHeld inputs

// Half a vector, of the rows where no more are there: twice as many additions a cycle.
template <class A>
struct HalfOf {
  typedef A type __attribute__((vector_size(kVectorBytes / 2)));
};
template <class A>
using Half = typename HalfOf<A>::type;
template <class V, class A>
LK_INLINE V load_as(const A* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

// sum_lanes_rows for multiples of kHeld inputs and kAtOnce outputs, which share each x they read.
// V: as many rows as are there, whole vectors or half.
template <class A, class V, int kBlockIn>
void sum_at_once(const Weights<A>& w, int64_t begin, int64_t end, const A* x, int64_t, A* sums) {
  constexpr int W = kLanes<A>, kQuarter = kHeld / kChains;
  const int64_t block_in = kBlockIn ? kBlockIn : w.block_in;
  const int64_t ldw = kBlockIn ? kBlockIn : w.out_stride;
  for (int64_t g = begin; g < end; ++g)
    for (int64_t o = 0; o < w.block_out; o += kAtOnce, sums += kAtOnce * W) {
      V acc[kAtOnce][kChains] = {};
      for (int64_t e = w.ptr[g]; e < w.ptr[g + 1]; ++e) {
        const A* xb = x + w.index[e] * (W * block_in);
        const A* wb = w.block(e, o);
        for (int64_t k = 0; k < block_in; k += kHeld, xb += kHeld * W, wb += kHeld)
#pragma GCC unroll 16
          for (int i = 0; i < kHeld; ++i) {
            const V xs = load_as<V>(xb + i * W);
#pragma GCC unroll 4
            for (int n = 0; n < kAtOnce; ++n) acc[n][i / kQuarter] += xs * wb[n * ldw + i];
          }
      }
#pragma GCC unroll 4
      for (int n = 0; n < kAtOnce; ++n) {
        const V sum = (acc[n][0] + acc[n][1]) + (acc[n][2] + acc[n][3]);
        memcpy(sums + n * W, &sum, sizeof(V));
      }
    }
}
#endif

LK_INLINE bool sums_at_once(const BlockMatrix& w) {
#if defined(__AVX512F__)  // with fewer registers no faster than lanes along inputs
  return w.block_out % kAtOnce == 0 && w.block_in % kHeld == 0;
#else
  return false;
#endif
}
template <class A>
LK_INLINE bool lanes_in(const BlockMatrix& w) {
  return w.block_in % kLanes<A> == 0 && !sums_at_once(w);
}

template <class A>
using SumGroups = void (*)(const Weights<A>&, int64_t, int64_t, const A*, int64_t, A*);

template <class A, int O, int R>
SumGroups<A> sum_lanes_in_of(int64_t block_in) {
  return block_in == 16 ? sum_lanes_in<A, O, R, 16> : sum_lanes_in<A, O, R, 0>;
}
template <class A>
SumGroups<A> sum_groups(const BlockMatrix& m, const Weights<A>& w, int64_t rows) {
  constexpr int W = kLanes<A>;
#if defined(__AVX512F__)
  if (sums_at_once(m)) {
    const bool small = w.block_in == kHeld && w.out_stride == kHeld;
    if (2 * rows <= W) return small ? sum_at_once<A, Half<A>, kHeld> : sum_at_once<A, Half<A>, 0>;
    return small ? sum_at_once<A, Vec<A>, kHeld> : sum_at_once<A, Vec<A>, 0>;
  }
#endif
  if (!lanes_in<A>(m)) return sum_lanes_rows<A>;
  if constexpr (W >= 4)
    if (w.block_out % 4 == 0) return sum_lanes_in_of<A, 4, W / 4>(w.block_in);
  if (w.block_out % 2 == 0) return sum_lanes_in_of<A, 2, W / 2>(w.block_in);
  if (rows == 1) return sum_lanes_in_of<A, 1, 1>(w.block_in);
  return 2 * rows <= W ? sum_lanes_in_of<A, 1, W / 2>(w.block_in)
                       : sum_lanes_in_of<A, 1, W>(w.block_in);
}

// x rows of one panel as [inputs][W]: columns past the edge are zero, rows repeat the last one.
template <class S, class A>
void pack_panel_transposed(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t inputs,
                           A* panel) {
  constexpr int W = kLanes<A>;
  const auto row = [&](int64_t r) { return x + min_of(r, rows - 1) * ldx; };
  int64_t k = 0;
  for (; k + W <= cols; k += W) {
    Vec<A> v[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) v[r] = load_wide(row(r) + k);
    transpose<A>(v);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(panel + (k + i) * W, v[i]);
  }
  for (; k < inputs; ++k)
    for (int64_t r = 0; r < W; ++r) panel[k * W + r] = k < cols ? A(widen(row(r)[k])) : A(0);
}

constexpr int64_t kStripBytes = 128 << 10;  // weights one pass over the panels keeps in L2
constexpr int64_t kPieceOutputs = 128;      // whose sums stay in L1
// The matrix with outputs and inputs of each block swapped, for packing inputs fastest.
LK_INLINE BlockMatrix swapped(BlockMatrix w) {
  const BlockMatrix from = w;
  w.block_out = from.block_in, w.block_in = from.block_out;
  w.out_stride = from.in_stride, w.in_stride = from.out_stride;
  return w;
}

template <class S>
bool packs_few_outputs(const BlockMatrix& w) {
  using A = typename Accumulator<S>::type;
  return sizeof(S) != sizeof(A) || (w.block_in % kLanes<A> == 0 && w.in_stride != 1);
}

// The sums of some outputs [n][W rows] through the epilogue, 2 W outputs at a time.
template <class S, class A>
void finish_sums(const Product& p, const A* sums, int64_t row, int64_t rows, int64_t first,
                 int64_t outputs) {
  constexpr int W = kLanes<A>, kOutputs = 2 * W;
  const S* residual = p.residual ? static_cast<const S*>(p.residual) + row * p.ldr : nullptr;
  S* y = static_cast<S*>(p.y) + row * p.ldy;
  for (int64_t n = 0; n < outputs; n += kOutputs, first += kOutputs, sums += kOutputs * W) {
    A tile[W * kOutputs];
    const int64_t cols = min_of<int64_t>(kOutputs, outputs - n);
    const bool direct = cols == kOutputs && rows == W && !p.activation && !residual;
    for (int64_t half = 0; half < kOutputs; half += W) {
      Vec<A> v[W];
      for (int i = 0; i < W; ++i) {
        v[i] = load(sums + (half + i) * W);
        if (p.bias && half + i < cols)
          v[i] += splat(A(widen(static_cast<const S*>(p.bias)[first + half + i])));
      }
      transpose<A>(v);
      if (direct) {
        for (int i = 0; i < W; ++i) store_narrow(y + i * p.ldy + first + half, v[i]);
      } else {
        for (int i = 0; i < W; ++i) store(tile + i * kOutputs + half, v[i]);
      }
    }
    if (direct) continue;
    finish(p.activation, tile, kOutputs, int(rows), cols, residual ? residual + first : nullptr,
           p.ldr, y + first, p.ldy);
  }
}

// Groups whose sums are kept at once, and the elements that takes.
LK_INLINE int64_t piece_groups(const BlockMatrix& w) {
  return ceil_div(kPieceOutputs, w.block_out);
}
template <class A>
LK_INLINE int64_t sums_size(const BlockMatrix& w) {
  return (piece_groups(w) * w.block_out + 2 * kLanes<A>) * kLanes<A>;
}

// Elements of scratch: panels of x, sums, and the packed weights of a strip.
template <class S>
int64_t few_outputs_scratch(const Product& p, int64_t rows) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  int64_t size = ceil_div(rows, W) * W * padded_inputs(p) + sums_size<A>(p.w);
  if (packs_few_outputs<S>(p.w))
    size += p.max_entries * p.w.block_in * p.w.block_out + kStripBytes / int64_t(sizeof(A));
  return size;
}

template <class S>
void product_few_outputs(const Product& p, const Range& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const int64_t block = w.block_in * w.block_out;
  const bool packs = packs_few_outputs<S>(w);
  A* xs = static_cast<A*>(scratch);
  A* sums = xs + ceil_div(rows, W) * W * inputs;
  A* packed = sums + sums_size<A>(w);
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t height = min_of<int64_t>(W, rows - r);
    A* panel = xs + r * inputs;
    if (lanes_in<A>(w)) {
      if (height < W) memset(panel, 0, W * inputs * sizeof(A));
      pack_panel(x + r * p.ldx, p.ldx, height, p.in_features, w.block_in, panel, W);
    } else {
      pack_panel_transposed(x + r * p.ldx, p.ldx, height, p.in_features, inputs, panel);
    }
  }

  Weights<A> weights{static_cast<const A*>(w.values), w.ptr, w.index, w.position, w.block_out,
                     w.block_in, w.block_stride, w.out_stride, w.in_stride};
  int64_t strip_end;
  for (int64_t strip = t.group_begin; strip < t.group_end; strip = strip_end) {
    strip_end = strip + 1;
    while (strip_end < t.group_end &&
           (w.ptr[strip_end + 1] - w.ptr[strip]) * block * int64_t(sizeof(A)) <= kStripBytes)
      ++strip_end;
    if (packs) {
      const int64_t base = w.ptr[strip];
      pack_blocks<S>(swapped(w), base, w.ptr[strip_end], w.block_in, packed);
      weights.values = packed - base * block, weights.position = nullptr;
      weights.block_stride = block, weights.out_stride = w.block_in, weights.in_stride = 1;
    }
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t height = min_of<int64_t>(W, rows - r);
      const SumGroups<A> sum = sum_groups<A>(w, weights, height);
      for (int64_t g = strip, end; g < strip_end; g = end) {
        end = min_of(g + piece_groups(w), strip_end);
        sum(weights, g, end, xs + r * inputs, height, sums);
        finish_sums<S>(p, sums, t.row_begin + r, height, g * w.block_out,
                       min_of(end * w.block_out, p.out_features) - g * w.block_out);
      }
    }
  }
}

}  // namespace
}  // namespace lean_kernels

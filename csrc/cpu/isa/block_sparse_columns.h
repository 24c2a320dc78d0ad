// SPDX-License-Identifier: Apache-2.0
// Products with one output per block: lanes along rows of x, one block column after the other, so
// that x is read once for all outputs that need it.
#pragma once

#include "block_sparse_few_outputs.h"

#if defined(__AVX512F__)  // with fewer registers no faster than product_few_outputs
namespace lean_kernels {
namespace {

constexpr int64_t kColumnsBytes = 256 << 10;  // weights one pass over the panels keeps in L2
constexpr int64_t kColumnsOutputs = 256;      // whose sums stay in L1

// The products of kHeld inputs kept in registers: sums[target] [W rows] += x [kHeld][W rows]
// w [count][kHeld].
template <class A>
LK_INLINE void add_column(const A* x, const A* w, const int32_t* target, int64_t count, A* sums) {
  constexpr int W = kLanes<A>;
  Vec<A> held[kHeld];
#pragma GCC unroll 16
  for (int i = 0; i < kHeld; ++i) held[i] = load(x + i * W);
  const auto add = [&]<int N>(Vec<A>(&acc)[N], int64_t at) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[n] = load(sums + target[at + n]);
    add_products(acc, [&](int i) { return held[i]; }, w + at * kHeld, kHeld);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(sums + target[at + n], acc[n]);
  };
  Vec<A> some[kAtOnce], one[1];
  int64_t at = 0;
  for (; at + kAtOnce <= count; at += kAtOnce) add(some, at);
  for (; at < count; ++at) add(one, at);
}

// The entries of some groups cut into columns of kHeld inputs, in the order of these: inner loops
// of a length known when compiled are up to 1.4 times as fast.
template <class A>
struct Columns {
  A* w;             // [part of an entry][kHeld], widened
  int32_t* target;  // where in the sums each part is added
  int32_t* begin;   // [columns + 2]

  template <class S>
  void sort(const BlockMatrix& m, int64_t group_begin, int64_t group_end, int64_t columns) const {
    constexpr int W = kLanes<A>;
    const int64_t parts = m.block_in / kHeld;
    memset(begin, 0, (columns + 2) * sizeof(*begin));
    for (int64_t e = m.ptr[group_begin]; e < m.ptr[group_end]; ++e)
      for (int64_t i = 0; i < parts; ++i) ++begin[m.index[e] * parts + i + 2];
    for (int64_t c = 0; c < columns; ++c) begin[c + 2] += begin[c + 1];
    for (int64_t g = group_begin; g < group_end; ++g)
      for (int64_t e = m.ptr[g]; e < m.ptr[g + 1]; ++e) {
        const S* from =
            static_cast<const S*>(m.values) + (m.position ? m.position[e] : e) * m.block_stride;
        for (int64_t i = 0; i < parts; ++i, from += kHeld * m.in_stride) {
          const int64_t at = begin[m.index[e] * parts + i + 1]++;
          A* to = w + at * kHeld;
          target[at] = int32_t((g - group_begin) * W);
          if (m.in_stride == 1) {
            for (int k = 0; k < kHeld; k += W) store(to + k, load_wide(from + k));
          } else {
            for (int k = 0; k < kHeld; ++k) to[k] = widen(from[k * m.in_stride]);
          }
        }
      }
  }
};

// Where the parts of the scratch begin, in elements: panels of x, sums, and a strip's entries.
template <class A>
struct ColumnsScratch {
  int64_t sums, weights, entries, columns;
  size_t bytes;

  ColumnsScratch(const Product& p, int64_t rows) {
    constexpr int W = kLanes<A>;
    const int64_t inputs = padded_inputs(p);
    sums = ceil_div(rows, W) * W * inputs;
    weights = sums + (kColumnsOutputs + 2 * W) * W;
    entries = p.max_entries * (p.w.block_in / kHeld) + kColumnsBytes / (kHeld * int64_t(sizeof(A)));
    columns = inputs / kHeld;
    bytes = (weights + entries * kHeld) * sizeof(A) + (entries + columns + 2) * sizeof(int32_t);
  }
};

template <class S>
void product_by_columns(const Product& p, const Range& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const ColumnsScratch<A> parts(p, rows);
  A* xs = static_cast<A*>(scratch);
  A* sums = xs + parts.sums;
  A* packed = xs + parts.weights;
  int32_t* target = reinterpret_cast<int32_t*>(packed + parts.entries * kHeld);
  const Columns<A> columns{packed, target, target + parts.entries};
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  for (int64_t r = 0; r < rows; r += W)
    pack_panel_transposed(x + r * p.ldx, p.ldx, min_of<int64_t>(W, rows - r), p.in_features, inputs,
                          xs + r * inputs);
  int64_t end;
  for (int64_t begin = t.group_begin; begin < t.group_end; begin = end) {
    end = begin + 1;
    while (end < t.group_end && end - begin < kColumnsOutputs &&
           (w.ptr[end + 1] - w.ptr[begin]) * w.block_in * int64_t(sizeof(A)) <= kColumnsBytes)
      ++end;
    columns.template sort<S>(w, begin, end, parts.columns);
    for (int64_t r = 0; r < rows; r += W) {
      memset(sums, 0, (end - begin) * W * sizeof(A));
      for (int64_t c = 0; c < parts.columns; ++c) {
        const int64_t at = columns.begin[c];
        add_column(xs + r * inputs + c * kHeld * W, packed + at * kHeld, target + at,
                   columns.begin[c + 1] - at, sums);
      }
      finish_sums<S>(p, sums, t.row_begin + r, min_of<int64_t>(W, rows - r), begin, end - begin);
    }
  }
}

}  // namespace
}  // namespace lean_kernels
#endif

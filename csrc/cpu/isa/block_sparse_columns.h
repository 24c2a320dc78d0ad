// SPDX-License-Identifier: Apache-2.0
// Products with one output per block: lanes along rows of x, one block column after the other, so
// that x is read once for all outputs that need it.
#pragma once

#include "block_sparse_few_outputs.h"

#if defined(__AVX512F__)  // with fewer registers no faster than product_few_outputs
namespace lean_kernels {
namespace {

constexpr int kHeld = 16;   // inputs kept in registers
constexpr int kAtOnce = 4;  // outputs added to at once
constexpr int64_t kColumnsBytes = 256 << 10;  // weights one pass over the panels keeps in L2
constexpr int64_t kColumnsOutputs = 256;      // whose sums stay in L1

// sums[target[n]] [W rows] += x [kHeld][W rows] w[n] [kHeld], in two chains each.
template <class A, int N>
LK_INLINE void add_products(const Vec<A> (&x)[kHeld], const A* w, int64_t ldw, const int32_t* target,
                            A* sums) {
  Vec<A> even[N], odd[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    even[n] = load(sums + target[n]) + x[0] * w[n * ldw];
    odd[n] = x[1] * w[n * ldw + 1];
  }
#pragma GCC unroll 8
  for (int i = 2; i < kHeld; i += 2)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      even[n] += x[i] * w[n * ldw + i];
      odd[n] += x[i + 1] * w[n * ldw + i + 1];
    }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(sums + target[n], even[n] + odd[n]);
}

// The products of one block column: x [block_in][W rows], w [entries][block_in].
template <class A>
void add_column(const A* x, const A* w, int64_t block_in, const int32_t* target, int64_t entries,
                A* sums) {
  constexpr int W = kLanes<A>;
  for (int64_t k = 0; k < block_in; k += kHeld) {
    Vec<A> held[kHeld];
#pragma GCC unroll 16
    for (int i = 0; i < kHeld; ++i) held[i] = load(x + (k + i) * W);
    int64_t n = 0;
    for (; n + kAtOnce <= entries; n += kAtOnce)
      add_products<A, kAtOnce>(held, w + n * block_in + k, block_in, target + n, sums);
    for (; n < entries; ++n)
      add_products<A, 1>(held, w + n * block_in + k, block_in, target + n, sums);
  }
}

// The entries of some groups in the order of their columns.
template <class A>
struct Columns {
  A* w;             // [entry][block_in], widened
  int32_t* target;  // [entry]: where in the sums
  int32_t* begin;   // [columns + 2]

  template <class S>
  void sort(const BlockMatrix& m, int64_t group_begin, int64_t group_end, int64_t columns) const {
    constexpr int W = kLanes<A>;
    memset(begin, 0, (columns + 2) * sizeof(*begin));
    for (int64_t e = m.ptr[group_begin]; e < m.ptr[group_end]; ++e) ++begin[m.index[e] + 2];
    for (int64_t c = 0; c < columns; ++c) begin[c + 2] += begin[c + 1];
    for (int64_t g = group_begin; g < group_end; ++g)
      for (int64_t e = m.ptr[g]; e < m.ptr[g + 1]; ++e) {
        const int64_t at = begin[m.index[e] + 1]++;
        const S* from =
            static_cast<const S*>(m.values) + (m.position ? m.position[e] : e) * m.block_stride;
        A* to = w + at * m.block_in;
        target[at] = int32_t((g - group_begin) * W);
        if (m.in_stride == 1) {
          for (int64_t k = 0; k < m.block_in; k += W) store(to + k, load_wide(from + k));
        } else {
          for (int64_t k = 0; k < m.block_in; ++k) to[k] = widen(from[k * m.in_stride]);
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
    sums = ceil_div(rows, W) * W * padded_inputs(p);
    weights = sums + (kColumnsOutputs + 2 * W) * W;
    entries = p.max_entries + kColumnsBytes / (p.w.block_in * int64_t(sizeof(A)));
    columns = padded_inputs(p) / p.w.block_in;
    bytes = (weights + entries * p.w.block_in) * sizeof(A) +
            (entries + columns + 2) * sizeof(int32_t);
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
  int32_t* target = reinterpret_cast<int32_t*>(packed + parts.entries * w.block_in);
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
        const int64_t e = columns.begin[c], entries = columns.begin[c + 1] - e;
        add_column(xs + r * inputs + c * w.block_in * W, packed + e * w.block_in, w.block_in,
                   target + e, entries, sums);
      }
      finish_sums<S>(p, sums, t.row_begin + r, min_of<int64_t>(W, rows - r), begin, end - begin);
    }
  }
}

}  // namespace
}  // namespace lean_kernels
#endif

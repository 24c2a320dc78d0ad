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

// The kHeld weights of an output that one column of x meets, and where they count.
template <class A>
struct Part {
  const A* w;
  A* sums;  // [W rows]
};

// sums[n] += x(i) w(n)[i] over i < kHeld, in two chains each; lanes along rows.
template <int N, class V, class X, class F>
LK_INLINE void add_products(V (&sums)[N], const X& x, const F& w) {
  V odd[N];
#pragma GCC unroll 8
  for (int i = 0; i < kHeld; i += 2) {
    const V even_x = x(i), odd_x = x(i + 1);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const auto* wn = w(n) + i;
      sums[n] += even_x * wn[0];
      odd[n] = i ? odd[n] + odd_x * wn[1] : odd_x * wn[1];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sums[n] += odd[n];
}

// The products of kHeld inputs kept in registers: sums of each part += x [kHeld][W rows] w. V: as
// many rows as are there, whole vectors or half.
template <class V, class A>
void add_column(const A* x, const Part<A>* part, int64_t count) {
  V held[kHeld];
#pragma GCC unroll 16
  for (int i = 0; i < kHeld; ++i) held[i] = load_as<V>(x + i * kLanes<A>);
  const auto add = [&]<int N>(V(&acc)[N]) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[n] = load_as<V>(part[n].sums);
    add_products(acc, [&](int i) { return held[i]; }, [&](int n) { return part[n].w; });
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) memcpy(part[n].sums, &acc[n], sizeof(V));
    part += N, count -= N;
  };
  V some[kAtOnce], one[1];
  while (count >= kAtOnce) add(some);
  while (count > 0) add(one);
}

// Whether weights are copied into the order they are read in: to widen them, or because each column
// of large ones is spread over more pages than the TLB holds, for every panel anew.
template <class S>
bool copies_parts(const Product& p, int64_t rows) {
  using A = typename Accumulator<S>::type;
  return sizeof(S) != sizeof(A) || p.w.in_stride != 1 ||
         (rows > kLanes<A> && !weights_are_near<S>(p));
}

// The entries of some groups cut into columns of kHeld inputs, in the order of these: inner loops
// of a length known when compiled are up to 1.4 times as fast. parts: begin[c] to begin[c + 1] are
// those of column c. copies: their weights, or null.
template <class S, class A>
void sort_columns(const BlockMatrix& m, int64_t group_begin, int64_t group_end, int64_t columns,
                  int32_t* begin, Part<A>* parts, A* copies, A* sums) {
  constexpr int W = kLanes<A>;
  const int64_t per_block = m.block_in / kHeld;
  memset(begin, 0, (columns + 2) * sizeof(*begin));
  for (int64_t e = m.ptr[group_begin]; e < m.ptr[group_end]; ++e)
    for (int64_t i = 0; i < per_block; ++i) ++begin[m.index[e] * per_block + i + 2];
  for (int64_t c = 0; c < columns; ++c) begin[c + 2] += begin[c + 1];
  for (int64_t g = group_begin; g < group_end; ++g, sums += W)
    for (int64_t e = m.ptr[g]; e < m.ptr[g + 1]; ++e) {
      const S* from =
          static_cast<const S*>(m.values) + (m.position ? m.position[e] : e) * m.block_stride;
      for (int64_t i = 0; i < per_block; ++i, from += kHeld * m.in_stride) {
        const int64_t at = begin[m.index[e] * per_block + i + 1]++;
        if (!copies) {
          parts[at] = {reinterpret_cast<const A*>(from), sums};
          continue;
        }
        A* to = copies + at * kHeld;
        if (m.in_stride == 1) {
          for (int k = 0; k < kHeld; k += W) store(to + k, load_wide(from + k));
        } else {
          for (int k = 0; k < kHeld; ++k) to[k] = widen(from[k * m.in_stride]);
        }
        parts[at] = {to, sums};
      }
    }
}

// Where the parts of the scratch begin, in elements: panels of x, sums, and a strip's weights.
template <class S>
struct ColumnsScratch {
  using A = typename Accumulator<S>::type;
  int64_t sums, copies, parts, begin, columns;
  size_t bytes;

  ColumnsScratch(const Product& p, int64_t rows) {
    constexpr int W = kLanes<A>;
    const int64_t inputs = padded_inputs(p);
    const int64_t most = p.max_entries * p.w.block_in + kColumnsBytes / int64_t(sizeof(A));
    sums = ceil_div(rows, W) * W * inputs;
    copies = sums + (kColumnsOutputs + 2 * W) * W;
    parts = copies + (copies_parts<S>(p, rows) ? most : 0);
    begin = parts + most / kHeld * int64_t(sizeof(Part<A>) / sizeof(A));
    columns = inputs / kHeld;
    bytes = begin * sizeof(A) + (columns + 2) * sizeof(int32_t);
  }
};

template <class S>
void product_by_columns(const Product& p, const Range& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const ColumnsScratch<S> at(p, rows);
  A* xs = static_cast<A*>(scratch);
  A* sums = xs + at.sums;
  Part<A>* parts = reinterpret_cast<Part<A>*>(xs + at.parts);
  int32_t* column = reinterpret_cast<int32_t*>(xs + at.begin);
  A* copies = copies_parts<S>(p, rows) ? xs + at.copies : nullptr;
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
    sort_columns<S>(w, begin, end, at.columns, column, parts, copies, sums);
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t height = min_of<int64_t>(W, rows - r);
      const auto add = 2 * height <= W ? add_column<Half<A>, A> : add_column<Vec<A>, A>;
      memset(sums, 0, (end - begin) * W * sizeof(A));
      for (int64_t c = 0; c < at.columns; ++c)
        add(xs + r * inputs + c * kHeld * W, parts + column[c], column[c + 1] - column[c]);
      finish_sums<S>(p, sums, t.row_begin + r, height, begin, end - begin);
    }
  }
}

}  // namespace
}  // namespace lean_kernels
#endif

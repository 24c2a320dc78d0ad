// SPDX-License-Identifier: Apache-2.0
// Products of few rows with few outputs per block: lanes along four outputs and the four chains of
// each one's sum, which are those of sum_at_once.
#pragma once

#include "block_sparse_few_outputs.h"

#if defined(__AVX512F__)
namespace lean_kernels {
namespace {

constexpr int64_t kMostFewRows = 10;  // with more, lanes along rows are faster

template <class S>
bool takes_few_rows(const BlockMatrix& w, int64_t rows) {
  return !__is_same(S, double) && rows <= kMostFewRows && sums_at_once(w) && w.in_stride == 1;
}

// v[n] lane 4 q + i <-> v[i] lane 4 q + n.
LK_INLINE void transpose_quarters(Vec<float> (&v)[kAtOnce]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>();
  exchange<1, float>(v[0], v[1], lanes);
  exchange<1, float>(v[2], v[3], lanes);
  exchange<2, float>(v[0], v[2], lanes);
  exchange<2, float>(v[1], v[3], lanes);
}

// Lane 4 q + i in each lane of its quarter q.
template <int i, int... lane>
LK_INLINE Vec<float> spread_in_quarters(Vec<float> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane / 4 * 4 + i)...);
}

// sums += products of kHeld inputs: v[n] their weights of output n, transposed here.
template <int R>
LK_INLINE void add_quarters(Vec<float> (&sums)[R], Vec<float> (&v)[kAtOnce], const float* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>();
  transpose_quarters(v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec<float> xs = load(x + r * kHeld);
    sums[r] += v[0] * spread_in_quarters<0>(xs, lanes);
    sums[r] += v[1] * spread_in_quarters<1>(xs, lanes);
    sums[r] += v[2] * spread_in_quarters<2>(xs, lanes);
    sums[r] += v[3] * spread_in_quarters<3>(xs, lanes);
  }
}

// sums [R][ld] = x Wᵀ of the groups [begin, end). x: panel [input / kHeld][R][kHeld].
template <class S, int R>
void sum_few_rows(const BlockMatrix& w, int64_t begin, int64_t end, const float* x, float* sums,
                  int64_t ld) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>();
  for (int64_t g = begin; g < end; ++g)
    for (int64_t o = 0; o < w.block_out; o += kAtOnce, sums += kAtOnce) {
      Vec<float> acc[R] = {};
      for (int64_t e = w.ptr[g]; e < w.ptr[g + 1]; ++e) {
        const float* xb = x + w.index[e] * w.block_in * R;
        const S* wb = static_cast<const S*>(w.values) +
                      (w.position ? w.position[e] : e) * w.block_stride + o * w.out_stride;
        for (int64_t k = 0; k < w.block_in; k += kHeld, xb += kHeld * R) {
          Vec<float> v[kAtOnce];
#pragma GCC unroll 4
          for (int n = 0; n < kAtOnce; ++n) v[n] = load_wide(wb + n * w.out_stride + k);
          add_quarters(acc, v, xb);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[r] += swap_lanes<4, float>(acc[r], lanes);
        acc[r] += swap_lanes<8, float>(acc[r], lanes);
        memcpy(sums + r * ld, &acc[r], kAtOnce * sizeof(float));
      }
    }
}

using SumFewRows = void (*)(const BlockMatrix&, int64_t, int64_t, const float*, float*, int64_t);
template <class S, int R = kMostFewRows>
SumFewRows sum_few_rows_of(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? sum_few_rows<S, R> : sum_few_rows_of<S, R - 1>(rows);
  }
}

// Sums of a row kept at once: whole vectors, two of which the epilogue takes.
LK_INLINE int64_t few_rows_sums(const BlockMatrix& w) {
  return piece_groups(w) * w.block_out + 2 * kLanes<float>;
}
LK_INLINE int64_t few_rows_scratch(const Product& p, int64_t rows) {
  return rows * (padded_inputs(p) + few_rows_sums(p.w));
}

template <class S>
void product_few_rows(const Product& p, const Range& t, void* scratch) {
  constexpr int64_t kStrip = 2 * kLanes<float>;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin, ld = few_rows_sums(w);
  float* xs = static_cast<float*>(scratch);
  float* sums = xs + rows * inputs;
  const int64_t packed = ceil_div(p.in_features, kHeld) * kHeld;
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  pack_panel(x, p.ldx, rows, p.in_features, kHeld, xs, rows);
  memset(xs + packed * rows, 0, (inputs - packed) * rows * sizeof(float));
  const SumFewRows sum = sum_few_rows_of<S>(rows);
  for (int64_t g = t.group_begin, end; g < t.group_end; g = end) {
    end = min_of(g + piece_groups(w), t.group_end);
    sum(w, g, end, xs, sums, ld);
    const int64_t first = g * w.block_out, cols = min_of(end * w.block_out, p.out_features) - first;
    const int64_t strips = cols / kStrip, whole = strips * kStrip;
    const S* bias = p.bias ? static_cast<const S*>(p.bias) + first : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = sums + r * ld;
      for (int64_t c = 0; bias && c < cols; ++c) row[c] += widen(bias[c]);
      const int64_t at = t.row_begin + r;
      S* y = static_cast<S*>(p.y) + at * p.ldy + first;
      const S* add =
          p.residual ? static_cast<const S*>(p.residual) + at * p.ldr + first : nullptr;
      // As if strips were rows: the epilogue takes several at once.
      finish(p.activation, row, kStrip, int(strips), kStrip, add, kStrip, y, kStrip);
      if (whole < cols)
        finish(p.activation, row + whole, kStrip, 1, cols - whole, add ? add + whole : nullptr,
               kStrip, y + whole, kStrip);
    }
  }
}

}  // namespace
}  // namespace lean_kernels
#endif

// SPDX-License-Identifier: Apache-2.0
// Kernel of tensor_product_embedding: a warp makes a row, each lane some columns of the product
// [first digit] x [the other digits], in registers. A row that does not fit them is made again for
// each pass of its norm. Also compiled for the CPU, by tests/cuda_emulator.h.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lean_kernels {

constexpr int kRowThreads = 128;
constexpr int kRowOrder = 4, kDigits = 8, kColumns = 2;  // kDigits x kColumns numbers of a tile

struct RowTable {
  const void* ids;    // [positions], or null
  const void* table;  // [count, features]
  int64_t count;
  bool wide;  // int64 ids, else int32
};

struct ProductRows {
  RowTable ids;           // table: the morphemes [count, order]
  RowTable added[2];
  int index_bytes;        // of a morpheme: 2, 4 or 8
  const void* factors;    // [morphemes, rank, size]
  int64_t morphemes;
  int rank, size, order;
  int used[kRowOrder];    // digits of each factor that features reach
  int width;              // product of those after the first
  int features;
  int norm;               // 0: none, 1: LayerNorm, 2: RMSNorm
  const void* weight;     // [features] or null, accumulators
  const void* bias;
  double eps;
  void* y;  // [positions, features]
  int64_t positions;
};

template <class S>
struct RowAccumulator {
  using type = float;
};
template <>
struct RowAccumulator<double> {
  using type = double;
};

__device__ inline float to_wide(float v) { return v; }
__device__ inline double to_wide(double v) { return v; }
__device__ inline void from_wide(float v, float* to) { *to = v; }
__device__ inline void from_wide(double v, double* to) { *to = v; }
#if defined(__CUDACC__)
__device__ inline float to_wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_wide(__half v) { return __half2float(v); }
__device__ inline void from_wide(float v, __nv_bfloat16* to) { *to = __float2bfloat16(v); }
__device__ inline void from_wide(float v, __half* to) { *to = __float2half(v); }
#endif

// The row of a position; -1 if that is out of bounds.
__device__ inline int64_t row_of(const RowTable& t, int64_t position) {
  const int64_t row = t.wide ? static_cast<const int64_t*>(t.ids)[position]
                             : static_cast<const int32_t*>(t.ids)[position];
  return row >= 0 && row < t.count ? row : -1;
}

template <class A>
__device__ inline A warp_sum(A v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// value[a][c] = the numbers (digit + a, column + 32 c) of a row; 0 past its end.
template <class S, class A>
__device__ inline void make_tile(const ProductRows& p, const S* const (&factor)[kRowOrder],
                                 int digit, int column, A (&value)[kDigits][kColumns]) {
  int offset[kColumns][kRowOrder];  // of a column's digits, in the factors after the first
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    int rest = column + 32 * c < p.width ? column + 32 * c : 0;
#pragma unroll
    for (int k = kRowOrder - 1; k > 0; --k) {
      offset[c][k] = 0;
      if (k < p.order) {
        offset[c][k] = rest % p.used[k];
        rest /= p.used[k];
      }
    }
#pragma unroll
    for (int a = 0; a < kDigits; ++a) value[a][c] = 0;
  }
  for (int i = 0; i < p.rank; ++i) {
    const int at = i * p.size;
    A tail[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      tail[c] = to_wide(factor[1][at + offset[c][1]]);
      if (p.order > 2) tail[c] *= to_wide(factor[2][at + offset[c][2]]);
      if (p.order > 3) tail[c] *= to_wide(factor[3][at + offset[c][3]]);
    }
#pragma unroll
    for (int a = 0; a < kDigits; ++a) {
      const A first = digit + a < p.used[0] ? to_wide(factor[0][at + digit + a]) : A(0);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) value[a][c] += first * tail[c];
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kRowThreads) product_rows_kernel(ProductRows p) {
  using A = typename RowAccumulator<S>::type;
  const int lane = threadIdx.x % 32;
  const int64_t warps = kRowThreads / 32, stride = int64_t(gridDim.x) * warps;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  const bool one_tile = p.used[0] <= kDigits && p.width <= 32 * kColumns;
  for (int64_t position = int64_t(blockIdx.x) * warps + threadIdx.x / 32; position < p.positions;
       position += stride) {
    int64_t row = row_of(p.ids, position);
    bool inside = row >= 0;
    if (!inside) row = 0;
    const S* factor[kRowOrder];
#pragma unroll
    for (int k = 0; k < kRowOrder; ++k) {
      factor[k] = nullptr;
      if (k < p.order && inside) {
        const int64_t at = row * p.order + k;
        const int64_t index = p.index_bytes == 8 ? static_cast<const int64_t*>(p.ids.table)[at]
                              : p.index_bytes == 4 ? static_cast<const int32_t*>(p.ids.table)[at]
                                                   : static_cast<const int16_t*>(p.ids.table)[at];
        inside = index >= 0 && index < p.morphemes;
        factor[k] = static_cast<const S*>(p.factors) + (inside ? index : 0) * p.rank * p.size;
      }
    }
    const S* added[2];
    for (int t = 0; t < 2; ++t) {
      added[t] = nullptr;
      if (!p.added[t].ids) continue;
      const int64_t from = row_of(p.added[t], position);
      if (from < 0) inside = false;
      added[t] = static_cast<const S*>(p.added[t].table) + (from < 0 ? 0 : from) * p.features;
    }
    S* y = static_cast<S*>(p.y) + position * p.features;
    if (!inside) {
      for (int k = lane; k < p.features; k += 32) from_wide(A(NAN), y + k);
      continue;
    }

    A value[kDigits][kColumns];
    // Calls use(number, its place in the row) for each number this lane has.
    const auto each = [&](bool made, const auto& use) {
      for (int digit = 0; digit < p.used[0]; digit += kDigits)
        for (int first = 0; first < p.width; first += 32 * kColumns) {
          if (!made) make_tile<S, A>(p, factor, digit, first + lane, value);
#pragma unroll
          for (int a = 0; a < kDigits; ++a)
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              const int column = first + lane + 32 * c;
              const int64_t k = int64_t(digit + a) * p.width + column;
              if (column >= p.width || k >= p.features) continue;
              if (!made)
                for (int t = 0; t < 2; ++t)
                  if (added[t]) value[a][c] += to_wide(added[t][k]);
              use(value[a][c], int(k));
            }
        }
    };
    A center = 0, scale = 1;
    bool made = false;
    if (p.norm == 1) {
      A sum = 0;
      each(false, [&](A v, int) { sum += v; });
      center = warp_sum(sum) / A(p.features);
      made = one_tile;
    }
    if (p.norm != 0) {
      A square = 0;
      each(made, [&](A v, int) { square += (v - center) * (v - center); });
      scale = A(1) / sqrt(warp_sum(square) / A(p.features) + A(p.eps));
      made = one_tile;
    }
    each(made, [&](A v, int k) {
      A out = (v - center) * scale;
      if (p.norm != 0 && weight) out *= weight[k];
      if (p.norm != 0 && bias) out += bias[k];
      from_wide(out, y + k);
    });
  }
}

}  // namespace lean_kernels

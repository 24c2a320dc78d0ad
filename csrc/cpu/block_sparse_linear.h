// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of block_sparse_linear take: plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean_kernels {

// A block-sparse matrix W seen as groups of `block_out` outputs. Group g owns the entries
// ptr[g] .. ptr[g + 1]; entry e reads input block index[e] and stored block position[e] (e itself
// when position is null). Element (o, i) of stored block b lies at
// values[b * block_stride + o * out_stride + i * in_stride].
struct BlockMatrix {
  const void* values;
  const int32_t* ptr;
  const int32_t* index;
  const int32_t* position;
  int64_t groups;
  int64_t block_out, block_in;
  int64_t block_stride, out_stride, in_stride;
};

// y [rows, out_features] = activation(x [rows, in_features] Wᵀ + bias) + residual, rows of stride
// ld*.
struct Product {
  const void* x;
  const void* bias;      // [out_features] or null
  const void* residual;  // like y, or null
  void* y;
  int64_t ldx, ldr, ldy;
  int64_t rows, in_features, out_features;
  int activation;
  int64_t max_entries;  // most entries of any group
  BlockMatrix w;
  const float* weight_scales = nullptr;  // [out_features], of int8 weights
};

// The part of a product one task computes.
struct Range {
  int64_t row_begin, row_end;
  int64_t group_begin, group_end;
};

// Gradient of the kept blocks: out[b] (o, i) = sum over rows of grad[row, o of b] * x[row, i of b],
// in float32 or float64.
struct BlockOuter {
  const void* grad;
  const void* x;
  void* out;
  int64_t ldg, ldx;
  int64_t rows, in_features, out_features;
  const int32_t* ptr;
  const int32_t* index;
  int64_t block_out, block_in;
  int64_t out_stride, in_stride;  // of an element within its contiguous block
};

constexpr int64_t kSumColumns = 64;  // a task sums whole strips of them

constexpr double kSerialFlop = 3e5;  // below this a second thread costs more than it brings

// How the rows of a product are best cut into tasks.
struct RowSplit {
  int64_t unit;   // a task should hold a multiple of these
  int64_t most;   // whose panels stay in L2
  int64_t least;  // fewer would read the weights too often
  int64_t per_weight = 2;  // reading a weight takes the time of so many multiply-adds with it
  double serial = kSerialFlop;  // the same for these kernels
};

// One instruction set's kernels for one storage type.
struct BlockSparseKernels {
  RowSplit (*product_rows)(const Product&);
  size_t (*product_scratch)(const Product&, int64_t rows);  // bytes for a task of that many rows
  void (*product)(const Product&, const Range&, void* scratch);
  size_t (*outer_scratch)(const BlockOuter&);  // bytes for a task
  void (*outer)(const BlockOuter&, int64_t entry_begin, int64_t entry_end, void* scratch);
  // sums [cols] of rows of stride ld, in float32 or float64: columns [begin, end).
  void (*column_sums)(const void* x, int64_t ld, int64_t rows, int64_t begin, int64_t end,
                      void* sums);
};

}  // namespace lean_kernels

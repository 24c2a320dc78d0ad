// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of add_layer_norm take.
#pragma once

#include <cstdint>

namespace lean_kernels {

// y[i] = LayerNorm(x[j] + residual[j]) * weight + bias, j = indices[i], or i without indices.
struct AddLayerNorm {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [features]; float32, or float64 for float64 rows
  const void* bias;      // like weight, or null
  const int64_t* indices;
  void* y;           // [rows, features], contiguous
  int64_t ldx, ldr;  // elements from row to row
  int64_t features;
  double eps;
};

// Rows [begin, end) of y. `scratch` holds one row of accumulators.
using AddLayerNormKernel = void (*)(const AddLayerNorm&, int64_t begin, int64_t end,
                                    void* scratch);

}  // namespace lean_kernels

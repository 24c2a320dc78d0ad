// SPDX-License-Identifier: Apache-2.0
// The kernels of each instruction set, and the one in use.
#pragma once

#include "add_layer_norm.h"
#include "block_sparse_linear.h"
#include "ragged_attention.h"
#include "token_selection.h"

namespace lean_kernels {

enum Dtype { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

struct CpuKernels {
  const char* name;
  BlockSparseKernels block_sparse[kDtypes];
  double (*fma_peak)(int64_t iterations);  // returns the FLOP executed; the caller takes the time
  AddLayerNormKernel add_layer_norm[kDtypes];
  AttentionKernels attention[kDtypes];
  SelectionKernels selection[2];  // of float32 and float64 scores
};

extern const CpuKernels kernels_generic;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2, kernels_avx512;
#endif

// The best set this processor has, or the one LEAN_KERNELS_CPU_ISA names. Throws
// std::runtime_error when that name is unknown or the processor lacks it.
const CpuKernels& cpu_kernels();

}  // namespace lean_kernels

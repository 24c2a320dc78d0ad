// SPDX-License-Identifier: Apache-2.0
// The kernels of each instruction set, and the one in use.
#pragma once

#include "add_layer_norm.h"
#include "block_sparse_linear.h"
#include "lazy_adam.h"
#include "low_rank_embedding.h"
#include "ngram_embedding_bag.h"
#include "ragged_attention.h"
#include "tensor_product_embedding.h"
#include "tensor_train_embedding.h"
#include "token_selection.h"

namespace lean_kernels {

enum Dtype { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

// What each file of isa/ defines, for the instruction set it is compiled for.
#define LEAN_KERNELS_DECLARE(isa)                                                   \
  namespace isa {                                                                   \
  extern const AddLayerNormKernel add_layer_norm[kDtypes];                          \
  extern const AttentionKernels attention[kDtypes];                                 \
  extern const BlockSparseKernels block_sparse[kDtypes];                            \
  extern const BlockSparseKernels block_sparse_int8[kDtypes]; /* none for float64 */ \
  extern const LazyAdamKernel lazy_adam[kDtypes];                                   \
  extern const LowRankKernels low_rank[kDtypes];                                    \
  extern const NgramBagKernels ngram_bag[kDtypes + 1]; /* the last of int8 rows */  \
  extern const SelectionKernels selection[2]; /* of float32 and float64 scores */   \
  extern const TensorProductKernels tensor_product[kDtypes];                        \
  extern const TensorTrainKernels tensor_train[kDtypes];                            \
  double fma_peak(int64_t iterations); /* the FLOP done; the caller takes the time */ \
  }
LEAN_KERNELS_DECLARE(generic)
LEAN_KERNELS_DECLARE(avx2)
LEAN_KERNELS_DECLARE(avx512)
#undef LEAN_KERNELS_DECLARE

// What processors with AMX do otherwise than others with AVX-512; gradients of weights aside.
namespace avx512 {
extern const AttentionKernels amx_attention_bfloat16;
extern const BlockSparseKernels amx_block_sparse_bfloat16;
extern const BlockSparseKernels amx_block_sparse_float16;
extern const BlockSparseKernels amx_block_sparse_int8[kDtypes];
}

struct CpuKernels {
  const char* name;
  const AddLayerNormKernel* add_layer_norm;
  const AttentionKernels* attention;
  const BlockSparseKernels* block_sparse;
  const BlockSparseKernels* block_sparse_int8;  // of x's dtype
  const LazyAdamKernel* lazy_adam;
  const LowRankKernels* low_rank;
  const NgramBagKernels* ngram_bag;
  const SelectionKernels* selection;
  const TensorProductKernels* tensor_product;
  const TensorTrainKernels* tensor_train;
  double (*fma_peak)(int64_t iterations);
};

// The best set this processor has, or the one LEAN_KERNELS_CPU_ISA names. Throws
// std::runtime_error when that name is unknown or the processor lacks it.
const CpuKernels& cpu_kernels();

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
#include "add_layer_norm.h"
#include "block_sparse_linear.h"
#include "ragged_attention.h"
#include "token_selection.h"

#include "../isa.h"

namespace lean_kernels {
const CpuKernels kernels_avx512 = {
    "avx512",
    {block_sparse_kernels<float>(), block_sparse_kernels<BFloat16>(),
     block_sparse_kernels<Float16>(), block_sparse_kernels<double>()},
    fma_peak,
    {add_layer_norm<float>, add_layer_norm<BFloat16>, add_layer_norm<Float16>,
     add_layer_norm<double>},
    {attention_kernels<float>(), attention_kernels<BFloat16>(), attention_kernels<Float16>(),
     attention_kernels<double>()},
    {selection_kernels<float>(), selection_kernels<double>()}};
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
#include "add_layer_norm.h"
#include "block_sparse_linear.h"

#include "../isa.h"

namespace lean_kernels {
const CpuKernels kernels_avx512 = {
    "avx512",
    {block_sparse_kernels<float>(), block_sparse_kernels<BFloat16>(),
     block_sparse_kernels<Float16>(), block_sparse_kernels<double>()},
    fma_peak,
    {add_layer_norm<float>, add_layer_norm<BFloat16>, add_layer_norm<Float16>,
     add_layer_norm<double>}};
}  // namespace lean_kernels

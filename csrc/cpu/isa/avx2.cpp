// SPDX-License-Identifier: Apache-2.0
#include "block_sparse_linear.h"

#include "../isa.h"

namespace lean_kernels {
const CpuKernels kernels_avx2 = {
    "avx2",
    {block_sparse_kernels<float>(), block_sparse_kernels<BFloat16>(),
     block_sparse_kernels<Float16>(), block_sparse_kernels<double>()},
    fma_peak};
}  // namespace lean_kernels

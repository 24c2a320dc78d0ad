// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of lazy_adam take.
#pragma once

#include <cstdint>

namespace lean_kernels {

// The rows of a parameter that a step moves, and their moments, all of one dtype.
struct LazyAdam {
  void *param, *exp_avg, *exp_avg_sq;  // [*, features], contiguous
  const int64_t* rows;
  const void* grad;  // [rows, features]
  int64_t features;
  double step_size;  // the learning rate over the first moment's bias correction
  double root;       // of the second moment's bias correction
  double beta1, beta2, eps;
};

// Rows [begin, end) of grad.
using LazyAdamKernel = void (*)(const LazyAdam&, int64_t begin, int64_t end);

}  // namespace lean_kernels

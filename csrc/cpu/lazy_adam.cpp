// SPDX-License-Identifier: Apache-2.0
// lazy_adam on CPU: checks, and rows dealt to torch's thread pool.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "lazy_adam";
constexpr int64_t kTaskElements = 1 << 14;  // tasks small enough to balance, no smaller

}  // namespace

void lazy_adam(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& step, const Tensor& rows, const Tensor& grad, double lr, double beta1,
               double beta2, double eps) {
  const Dtype dtype = dtype_of(param, kOp);
  for (const Tensor* t : {&param, &exp_avg, &exp_avg_sq})
    STD_TORCH_CHECK(t->dim() == 2 && t->sizes() == param.sizes() && t->is_contiguous() &&
                        t->scalar_type() == param.scalar_type(),
                    kOp, ": param and its moments must be contiguous, of one shape and dtype");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long &&
                      grad.dim() == 2 && grad.size(0) == rows.size(0) &&
                      grad.size(1) == param.size(1) && grad.scalar_type() == param.scalar_type(),
                  kOp, ": rows must be int64 [N] and grad [N, D] in param's dtype");
  STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Float, kOp,
                  ": step must be a float32 scalar");
  const int64_t count = rows.size(0), features = param.size(1);
  if (count == 0 || features == 0) return;
  const Tensor which = as_contiguous(rows), from = as_contiguous(grad);
  const int64_t* row = static_cast<const int64_t*>(which.const_data_ptr());
  uint64_t largest = 0;  // a negative index becomes a huge one
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint64_t(row[i]));
  STD_TORCH_CHECK(largest < uint64_t(param.size(0)), kOp, ": rows must lie in [0, ", param.size(0),
                  "), the rows of param");
  const double t = *static_cast<const float*>(step.const_data_ptr());
  const LazyAdam p{param.mutable_data_ptr(), exp_avg.mutable_data_ptr(),
                   exp_avg_sq.mutable_data_ptr(), row, from.const_data_ptr(), features,
                   lr / (1 - std::pow(beta1, t)), std::sqrt(1 - std::pow(beta2, t)), beta1, beta2,
                   eps};
  const LazyAdamKernel kernel = cpu_kernels().lazy_adam[dtype];
  const int64_t tasks = std::min(count, ceil_div(count * features, kTaskElements));
  run_tasks(tasks, torch::stable::get_num_threads(),
            [&](int64_t i) { kernel(p, count * i / tasks, count * (i + 1) / tasks); });
}

}  // namespace lean_kernels

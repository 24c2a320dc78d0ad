// SPDX-License-Identifier: Apache-2.0
// add_layer_norm on CPU: checks, and rows dealt to torch's thread pool.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "add_layer_norm";
constexpr int64_t kTaskBytes = 1 << 17;    // of x: tasks small enough to balance, no smaller
constexpr int64_t kSerialBytes = 1 << 16;  // of x: a second thread costs more below this

}  // namespace

Tensor add_layer_norm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight,
                      std::optional<Tensor> bias, std::optional<Tensor> indices, double eps) {
  const Rows in(x, kOp);
  const Dtype dtype = dtype_of(x, kOp);
  STD_TORCH_CHECK(in.cols > 0, "add_layer_norm: x must have at least one feature");
  const Tensor scale = norm_parameter(weight, in.cols, x.scalar_type(), kOp);
  AddLayerNorm p{in.tensor.const_data_ptr(), nullptr, scale.const_data_ptr(), nullptr, nullptr,
                 nullptr, in.stride, 0, in.cols, eps};
  std::optional<Rows> added;
  if (residual) {
    STD_TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(),
                    "add_layer_norm: residual must have x's shape and dtype");
    added.emplace(*residual, kOp);
    p.residual = added->tensor.const_data_ptr();
    p.ldr = added->stride;
  }
  std::optional<Tensor> shift;
  if (bias) {
    shift = norm_parameter(*bias, in.cols, x.scalar_type(), kOp);
    p.bias = shift->const_data_ptr();
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  int64_t rows = in.count;
  if (indices) {
    STD_TORCH_CHECK(x.dim() == 2 && indices->dim() == 1 &&
                        indices->scalar_type() == ScalarType::Long,
                    "add_layer_norm: with indices, x must be [T, D] and indices int64 [N]");
    indices = as_contiguous(*indices);
    p.indices = static_cast<const int64_t*>(indices->const_data_ptr());
    rows = sizes[0] = indices->size(0);
    uint64_t largest = 0;  // a negative index becomes a huge one
    for (int64_t i = 0; i < rows; ++i) largest = std::max(largest, uint64_t(p.indices[i]));
    STD_TORCH_CHECK(rows == 0 || largest < uint64_t(in.count),
                    "add_layer_norm: indices must lie in [0, ", in.count, "), the rows of x");
  }
  Tensor y = torch::stable::new_empty(x, sizes);
  p.y = y.mutable_data_ptr();
  const AddLayerNormKernel kernel = cpu_kernels().add_layer_norm[dtype];
  const int64_t bytes = in.cols * x.element_size();
  const int64_t threads = rows * bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  // As many for each thread, all of one size.
  const int64_t tasks =
      std::min(rows, ceil_div(ceil_div(rows * bytes, kTaskBytes), threads) * threads);
  run_tasks(tasks, threads, [&](int64_t i) {
    void* row = thread_scratch(in.cols * (dtype == kFloat64 ? 8 : 4));
    kernel(p, rows * i / tasks, rows * (i + 1) / tasks, row);
  });
  return y;
}

}  // namespace lean_kernels

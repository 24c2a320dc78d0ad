// SPDX-License-Identifier: Apache-2.0
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

namespace lean_kernels {
Tensor add_layer_norm(const Tensor&, std::optional<Tensor>, const Tensor&, std::optional<Tensor>,
                      std::optional<Tensor>, double);
Tensor block_sparse_linear(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           std::optional<Tensor>, std::optional<Tensor>, int64_t, int64_t);
Tensor block_sparse_linear_grad_input(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      int64_t);
Tensor block_sparse_linear_grad_weight(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       int64_t, int64_t);
}  // namespace lean_kernels

STABLE_TORCH_LIBRARY_IMPL(lean_kernels, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&lean_kernels::add_layer_norm));
  m.impl("block_sparse_linear", TORCH_BOX(&lean_kernels::block_sparse_linear));
  m.impl("block_sparse_linear_grad_input", TORCH_BOX(&lean_kernels::block_sparse_linear_grad_input));
  m.impl("block_sparse_linear_grad_weight",
         TORCH_BOX(&lean_kernels::block_sparse_linear_grad_weight));
}

// SPDX-License-Identifier: Apache-2.0
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

namespace lean_kernels {
std::vector<Tensor> gather_tokens_cuda(const std::vector<Tensor>&, const Tensor&);
std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens_cuda(
    const Tensor&, const Tensor&, std::optional<Tensor>, std::optional<Tensor>, double, int64_t,
    std::optional<int64_t>, const std::vector<Tensor>&);
using Maybe = std::optional<Tensor>;
Tensor tensor_product_embedding_cuda(const Tensor&, const Tensor&, const Tensor&, int64_t, Maybe,
                                     Maybe, Maybe, Maybe, int64_t, Maybe, Maybe, double);
}  // namespace lean_kernels

STABLE_TORCH_LIBRARY_IMPL(lean_kernels, CUDA, m) {
  m.impl("gather_tokens", TORCH_BOX(&lean_kernels::gather_tokens_cuda));
  m.impl("select_tokens", TORCH_BOX(&lean_kernels::select_tokens_cuda));
  m.impl("tensor_product_embedding", TORCH_BOX(&lean_kernels::tensor_product_embedding_cuda));
}

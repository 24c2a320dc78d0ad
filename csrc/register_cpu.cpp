// SPDX-License-Identifier: Apache-2.0
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

namespace lean_kernels {
Tensor add_layer_norm(const Tensor&, std::optional<Tensor>, const Tensor&, std::optional<Tensor>,
                      std::optional<Tensor>, double);
Tensor block_sparse_linear(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           std::optional<Tensor>, std::optional<Tensor>, int64_t, int64_t);
Tensor block_sparse_linear_int8(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, std::optional<Tensor>, std::optional<Tensor>,
                                int64_t, int64_t);
void lazy_adam(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
               const Tensor&, double, double, double, double);
Tensor ngram_embedding_bag(const Tensor&, const Tensor&, const Tensor&, std::optional<Tensor>,
                           std::optional<Tensor>, int64_t, bool);
Tensor ngram_embedding_bag_grad_table(const Tensor&, const Tensor&, const Tensor&,
                                      std::optional<Tensor>, int64_t, int64_t, bool);
std::tuple<Tensor, Tensor> ngram_embedding_bag_grad_rows(const Tensor&, const Tensor&,
                                                         const Tensor&, std::optional<Tensor>,
                                                         int64_t, int64_t, bool);
Tensor ngram_embedding_bag_grad_weights(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        std::optional<Tensor>, int64_t, bool);
std::tuple<Tensor, Tensor> ngram_lookup(const Tensor&, const Tensor&, std::optional<Tensor>,
                                        int64_t, int64_t, int64_t, bool);
Tensor ngram_slots(const Tensor&);
using Tensors = std::tuple<Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;
Tensors block_sparse_linear_grad(const Tensor&, Maybe, const Tensor&, const Tensor&, const Tensor&,
                                 int64_t, bool, bool, bool);
Tensor low_rank_embedding(const Tensor&, const Tensor&, Maybe, const Tensor&, Maybe, int64_t, Maybe,
                          Maybe, Maybe, Maybe, int64_t, Maybe, Maybe, double);
std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_embedding_grad(
    const Tensor&, const Tensor&, const Tensor&, Maybe, const Tensor&, Maybe, int64_t, int64_t,
    bool, bool, bool, bool, bool);
Tensor low_rank_logits(const Tensor&, const Tensor&, Maybe, Maybe, Maybe);
Tensors ragged_attention(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Maybe, Maybe,
                         Maybe, int64_t, double, int64_t, int64_t, int64_t, bool, bool);
Tensors ragged_attention_grad(const Tensor&, Maybe, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const Tensor&, Maybe, Maybe, Maybe,
                              int64_t, double, int64_t, int64_t, int64_t, bool, bool);
std::vector<Tensor> gather_tokens(const std::vector<Tensor>&, const Tensor&);
Tensor scatter_tokens(const Tensor&, const Tensor&, int64_t);
void scatter_tokens_into(const Tensor&, const Tensor&, const Tensor&);
Tensor tensor_train_embedding(const Tensor&, const std::vector<Tensor>&, int64_t, int64_t);
std::vector<Tensor> tensor_train_embedding_grad(const Tensor&, const Tensor&,
                                                const std::vector<Tensor>&, int64_t, int64_t,
                                                bool);
std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens(
    const Tensor&, const Tensor&, std::optional<Tensor>, std::optional<Tensor>, double, int64_t,
    std::optional<int64_t>, const std::vector<Tensor>&);
Tensor tensor_product_embedding(const Tensor&, const Tensor&, const Tensor&, int64_t, Maybe, Maybe,
                                Maybe, Maybe, int64_t, Maybe, Maybe, double);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensor_product_embedding_grad(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, Maybe, Maybe, Maybe, Maybe, int64_t,
    Maybe, double, int64_t);
}  // namespace lean_kernels

STABLE_TORCH_LIBRARY_IMPL(lean_kernels, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&lean_kernels::add_layer_norm));
  m.impl("block_sparse_linear", TORCH_BOX(&lean_kernels::block_sparse_linear));
  m.impl("block_sparse_linear_int8", TORCH_BOX(&lean_kernels::block_sparse_linear_int8));
  m.impl("block_sparse_linear_grad", TORCH_BOX(&lean_kernels::block_sparse_linear_grad));
  m.impl("lazy_adam_", TORCH_BOX(&lean_kernels::lazy_adam));
  m.impl("low_rank_embedding", TORCH_BOX(&lean_kernels::low_rank_embedding));
  m.impl("low_rank_embedding_grad", TORCH_BOX(&lean_kernels::low_rank_embedding_grad));
  m.impl("low_rank_logits", TORCH_BOX(&lean_kernels::low_rank_logits));
  m.impl("ngram_embedding_bag", TORCH_BOX(&lean_kernels::ngram_embedding_bag));
  m.impl("ngram_embedding_bag_grad_rows", TORCH_BOX(&lean_kernels::ngram_embedding_bag_grad_rows));
  m.impl("ngram_embedding_bag_grad_table",
         TORCH_BOX(&lean_kernels::ngram_embedding_bag_grad_table));
  m.impl("ngram_embedding_bag_grad_weights",
         TORCH_BOX(&lean_kernels::ngram_embedding_bag_grad_weights));
  m.impl("ngram_lookup", TORCH_BOX(&lean_kernels::ngram_lookup));
  m.impl("ngram_slots", TORCH_BOX(&lean_kernels::ngram_slots));
  m.impl("ragged_attention", TORCH_BOX(&lean_kernels::ragged_attention));
  m.impl("ragged_attention_grad", TORCH_BOX(&lean_kernels::ragged_attention_grad));
  m.impl("gather_tokens", TORCH_BOX(&lean_kernels::gather_tokens));
  m.impl("scatter_tokens", TORCH_BOX(&lean_kernels::scatter_tokens));
  m.impl("scatter_tokens_into", TORCH_BOX(&lean_kernels::scatter_tokens_into));
  m.impl("select_tokens", TORCH_BOX(&lean_kernels::select_tokens));
  m.impl("tensor_product_embedding", TORCH_BOX(&lean_kernels::tensor_product_embedding));
  m.impl("tensor_product_embedding_grad", TORCH_BOX(&lean_kernels::tensor_product_embedding_grad));
  m.impl("tensor_train_embedding", TORCH_BOX(&lean_kernels::tensor_train_embedding));
  m.impl("tensor_train_embedding_grad", TORCH_BOX(&lean_kernels::tensor_train_embedding_grad));
}

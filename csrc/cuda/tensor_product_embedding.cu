// SPDX-License-Identifier: Apache-2.0
// tensor_product_embedding on CUDA: tensors in, one launch on the current stream out. Its gradient
// is Triton's.
#include "tensor_product_embedding.cuh"

#include <algorithm>
#include <optional>
#include <vector>

#include "launch.h"

namespace lean_kernels {

namespace {

using Maybe = std::optional<Tensor>;

constexpr const char* kOp = "tensor_product_embedding";
constexpr int64_t kBlocksPerProcessor = 16;

bool is_index(ScalarType t) { return t == ScalarType::Long || t == ScalarType::Int; }

// Owns what it makes contiguous.
struct Kept {
  std::vector<Tensor> tensors;
  int device;

  const void* operator()(const Tensor& t) {
    STD_TORCH_CHECK(t.get_device_index() == device, kOp, ": tensors must be on one device");
    tensors.push_back(as_contiguous(t));
    return tensors.back().const_data_ptr();
  }
};

template <class S>
void launch(const ProductRows& p, int64_t blocks, cudaStream_t stream) {
  product_rows_kernel<S><<<unsigned(blocks), kRowThreads, 0, stream>>>(p);
}

}  // namespace

Tensor tensor_product_embedding_cuda(const Tensor& ids, const Tensor& morphemes,
                                     const Tensor& factors, int64_t embedding_dim, Maybe ids0,
                                     Maybe table0, Maybe ids1, Maybe table1, int64_t norm,
                                     Maybe weight, Maybe bias, double eps) {
  const ScalarType dtype = factors.scalar_type(), index = morphemes.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  STD_TORCH_CHECK(factors.dim() == 3 && factors.size(1) >= 1 && factors.size(2) >= 1 &&
                      morphemes.dim() == 2 && morphemes.size(1) >= 2 &&
                      morphemes.size(1) <= kRowOrder && is_index(ids.scalar_type()) &&
                      (is_index(index) || index == ScalarType::Short),
                  kOp, ": factors must be [M, r, q], morphemes integers [V, n], n from 2 to 4");
  STD_TORCH_CHECK(embedding_dim >= 1 && embedding_dim <= INT32_MAX &&
                      factors.size(1) * factors.size(2) <= INT32_MAX && norm >= 0 && norm <= 2,
                  kOp, ": embedding_dim and r q must lie in [1, 2^31), norm in [0, 2]");
  const DeviceGuard guard(factors.get_device_index());
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(embedding_dim);
  Tensor y = torch::stable::new_empty(factors, sizes);
  Kept keep{{}, int(factors.get_device_index())};
  ProductRows p{};
  p.ids = {keep(ids), keep(morphemes), morphemes.size(0), ids.scalar_type() == ScalarType::Long};
  p.index_bytes = int(morphemes.element_size());
  p.factors = keep(factors);
  p.morphemes = factors.size(0);
  p.rank = int(factors.size(1));
  p.size = int(factors.size(2));
  p.order = int(morphemes.size(1));
  p.features = int(embedding_dim);
  p.norm = int(norm);
  p.eps = eps;
  p.y = y.mutable_data_ptr();
  p.positions = ids.numel();
  int64_t left = embedding_dim, below = 1, width = 1;
  for (int k = 1; k < p.order; ++k) below = std::min(below * p.size, embedding_dim);
  STD_TORCH_CHECK(below * p.size >= embedding_dim, kOp, ": embedding_dim must be at most q^n");
  for (int k = 0; k < p.order; ++k) {
    below = 1;
    for (int l = k + 1; l < p.order; ++l) below = std::min(below * p.size, embedding_dim);
    p.used[k] = int((left + below - 1) / below);
    left = std::min(left, below);
    width *= k > 0 ? p.used[k] : 1;
  }
  p.width = int(width);
  int tables = 0;
  for (const auto& [at, table] : {std::pair{&ids0, &table0}, std::pair{&ids1, &table1}}) {
    STD_TORCH_CHECK(bool(*at) == bool(*table), kOp, ": added ids and table come together");
    if (!*at) continue;
    STD_TORCH_CHECK((*table)->dim() == 2 && (*table)->size(1) == embedding_dim &&
                        (*table)->scalar_type() == dtype && (*at)->numel() == p.positions &&
                        is_index((*at)->scalar_type()),
                    kOp, ": an added table must be [*, D], its ids as many as ids");
    p.added[tables++] = {keep(**at), keep(**table), (*table)->size(0),
                         (*at)->scalar_type() == ScalarType::Long};
  }
  for (const auto& [t, to] : {std::pair{&weight, &p.weight}, std::pair{&bias, &p.bias}}) {
    if (!*t) continue;
    STD_TORCH_CHECK((*t)->numel() == embedding_dim, kOp, ": the norm's parameters must be [D]");
    *to = keep((*t)->scalar_type() == wide ? **t : torch::stable::to(**t, wide));
  }
  if (p.positions == 0) return y;
  const int64_t warps = kRowThreads / 32;
  const int64_t blocks =
      std::min((p.positions + warps - 1) / warps, kBlocksPerProcessor * processors(factors));
  const cudaStream_t stream = current_stream(factors);
  switch (dtype) {
    case ScalarType::Float: launch<float>(p, blocks, stream); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(p, blocks, stream); break;
    case ScalarType::Half: launch<__half>(p, blocks, stream); break;
    case ScalarType::Double: launch<double>(p, blocks, stream); break;
    default: STD_TORCH_CHECK(false, kOp, ": factors must be float32, bfloat16, float16 or float64");
  }
  check_launch(kOp);
  return y;
}

}  // namespace lean_kernels

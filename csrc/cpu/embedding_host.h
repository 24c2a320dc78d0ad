// SPDX-License-Identifier: Apache-2.0
// What the embedding ops share outside their kernels: ids, and the arguments of a row's end.
#pragma once

#include <optional>
#include <vector>

#include "embedding_row.h"
#include "host.h"

namespace lean_kernels {

using Maybe = std::optional<Tensor>;

// Larger outputs are written past the caches, which they would only flush.
constexpr int64_t kStreamBytes = int64_t(1) << 23;
constexpr int64_t kCacheLine = 64;

// Checked ids, contiguous. Reading them is cheap, and no kernel can then leave its tables.
struct Ids {
  Tensor tensor;
  bool wide;  // int64, else int32
  int64_t count;

  Ids(const Tensor& t, int64_t rows, const char* op, const char* label)
      : tensor(as_contiguous(t)), wide(t.scalar_type() == ScalarType::Long), count(t.numel()),
        data_(tensor.const_data_ptr()) {
    STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, op, ": ", label,
                    " must be int32 or int64");
    STD_TORCH_CHECK(count < int64_t(1) << 31, op, ": at most 2^31 - 1 ", label, ", got ", count);
    const uint64_t largest =
        wide ? largest_of<int64_t, uint64_t>() : largest_of<int32_t, uint32_t>();
    STD_TORCH_CHECK(count == 0 || largest < uint64_t(rows), op, ": ", label, " must lie in [0, ",
                    rows, ")");
  }

  const void* data() const { return data_; }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;  // torch is called for it, which is too slow for every id

  // A negative id becomes a huge one.
  template <class T, class U>
  uint64_t largest_of() const {
    const T* ids = static_cast<const T*>(data_);
    U largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, U(ids[i]));
    return largest;
  }
};

// The tail of the embedding ops' schemas, `Tensor? ids0, Tensor? table0, Tensor? ids1,
// Tensor? table1, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps`, for the rows of
// `out` [..., features], contiguous. Keeps alive what `rows` points into.
struct RowEnd {
  EmbeddingRows rows{};

  RowEnd(const char* op, const Tensor& out, const Maybe& ids0, const Maybe& table0,
         const Maybe& ids1, const Maybe& table1, int64_t norm, const Maybe& weight,
         const Maybe& bias, double eps, int64_t stream_bytes = kStreamBytes) {
    const int64_t features = out.size(out.dim() - 1), row_bytes = features * out.element_size();
    STD_TORCH_CHECK(norm >= kNoNorm && norm <= kRmsNorm && eps >= 0, op,
                    ": norm must be a code from 0 to 2, its eps not negative");
    int count = 0;
    for (const auto& [ids, table] : {std::pair{&ids0, &table0}, std::pair{&ids1, &table1}}) {
      STD_TORCH_CHECK(bool(*ids) == bool(*table), op, ": added ids and table come together");
      if (!*ids) continue;
      const Rows t(**table, op);
      STD_TORCH_CHECK(t.tensor.dim() == 2 && t.cols == features &&
                          t.tensor.scalar_type() == out.scalar_type(),
                      op, ": an added table must be [*, ", features, "] in the rows' dtype");
      const Ids checked(**ids, t.count, op, "added ids");
      STD_TORCH_CHECK(checked.count * features == out.numel(), op,
                      ": added ids must have the shape of ids");
      rows.added[count++] = {checked.data(), t.tensor.const_data_ptr(), t.stride, checked.wide};
      kept_.insert(kept_.end(), {t.tensor, checked.tensor});
    }
    rows.norm = int(norm);
    const auto parameter = [&](const Maybe& t) -> const void* {
      if (!t) return nullptr;
      kept_.push_back(norm_parameter(*t, features, out.scalar_type(), op));
      return kept_.back().const_data_ptr();
    };
    rows.weight = norm ? parameter(weight) : nullptr;
    rows.bias = norm ? parameter(bias) : nullptr;
    rows.eps = eps;
    rows.features = rows.stride = features;
    rows.out = out.mutable_data_ptr();
    const int64_t bytes = out.numel() * int64_t(out.element_size());
    rows.stream = bytes >= stream_bytes && row_bytes % kCacheLine == 0 &&
                  reinterpret_cast<uintptr_t>(rows.out) % kCacheLine == 0;
  }

 private:
  std::vector<Tensor> kept_;
};

}  // namespace lean_kernels

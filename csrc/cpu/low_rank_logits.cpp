// SPDX-License-Identifier: Apache-2.0
// low_rank_logits on CPU: checks, and strips of the vocabulary dealt to torch's thread pool.
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "embedding_host.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "low_rank_logits";
constexpr int64_t kParts = 8;             // of a thread's share of the vocabulary, to deal
constexpr int64_t kPartRows = 16;         // that pay for each of them
constexpr int64_t kRows = 480;            // multiplied by a group before the next: they stay in L2
constexpr int64_t kGroupBytes = 1 << 17;  // of a group's codes: they stay there too

}  // namespace

Tensor low_rank_logits(const Tensor& x, const Tensor& codes, Maybe scales, Maybe bias,
                       Maybe shift) {
  const Dtype dtype = dtype_of(x, kOp);
  const int64_t wide_bytes = dtype == kFloat64 ? 8 : 4;
  const LowRankKernels& kernels = cpu_kernels().low_rank[dtype];
  const Rows in(x, kOp);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(1) == in.cols && in.cols > 0, kOp,
                  ": x must be [..., rank] and codes [V, rank], rank positive");
  STD_TORCH_CHECK(codes.scalar_type() == (scales ? ScalarType::Char : x.scalar_type()), kOp,
                  ": codes must have the dtype of x, or be int8 with scales");
  const Rows table(codes, kOp);
  LowRankLogits p{};
  p.codes = table.tensor.const_data_ptr();
  p.code_stride = table.stride;
  p.vocabulary = table.count;
  p.rank = in.cols;
  const auto vector = [&](const Maybe& t, int64_t size, ScalarType type, const char* label) {
    STD_TORCH_CHECK(!t || (t->numel() == size && t->scalar_type() == type), kOp, ": ", label,
                    " has a shape or dtype that does not fit");
    return t ? Maybe(as_contiguous(*t)) : Maybe();
  };
  const auto data = [](const Maybe& t) { return t ? t->const_data_ptr() : nullptr; };
  const Maybe scale = vector(scales, p.vocabulary, ScalarType::Float, "scales");
  const Maybe add = vector(bias, p.vocabulary, x.scalar_type(), "bias");
  const Maybe shifts = vector(shift, in.count, x.scalar_type(), "shift");
  p.scales = static_cast<const float*>(data(scale));
  p.bias = data(add);
  p.shift = data(shifts);
  p.x = in.tensor.const_data_ptr();
  p.x_stride = in.stride;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.vocabulary;
  Tensor out = torch::stable::new_empty(x, sizes);
  if (out.numel() == 0) return out;

  const double flop = 2.0 * in.count * p.vocabulary * p.rank;
  const int64_t threads = flop < kSerialFlop ? 1 : torch::stable::get_num_threads();
  const int64_t strips = ceil_div(p.vocabulary, kernels.strip);
  const int64_t parts = std::clamp<int64_t>(in.count / kPartRows, 1, kParts);
  const int64_t tasks = std::min(strips, threads == 1 ? 1 : parts * threads);
  const int64_t strip_bytes = p.depth() * kernels.strip * wide_bytes;
  p.group = std::clamp<int64_t>(kGroupBytes / strip_bytes, 1, kLogitStrips) * kernels.strip;
  const auto at = [&](const void* data, int64_t element) {
    return data ? static_cast<const char*>(data) + element * x.element_size() : nullptr;
  };
  for (int64_t row = 0; row < in.count; row += kRows) {
    LowRankLogits part = p;
    part.rows = std::min(kRows, in.count - row);
    part.x = at(p.x, row * in.stride);
    part.shift = at(p.shift, row);
    part.out = static_cast<char*>(out.mutable_data_ptr()) + row * p.vocabulary * x.element_size();
    void* packed = thread_scratch<1>((part.rows * p.depth() + kernels.strip) * wide_bytes);
    kernels.pack_x(part, packed);
    run_tasks(tasks, threads, [&](int64_t i) {
      kernels.logits(part, packed, strips * i / tasks * kernels.strip,
                     std::min(p.vocabulary, strips * (i + 1) / tasks * kernels.strip),
                     thread_scratch((p.group * p.depth() + kernels.strip) * wide_bytes));
    });
  }
  return out;
}

}  // namespace lean_kernels

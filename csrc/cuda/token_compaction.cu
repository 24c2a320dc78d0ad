// SPDX-License-Identifier: Apache-2.0
// select_tokens and gather_tokens on CUDA: tensors in, launches on the current stream out.
#include "token_compaction.cuh"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

namespace lean_kernels {
namespace {

constexpr int64_t kBlocksPerProcessor = 8;  // of kMoveThreads: all the threads one holds

// Results with `rows` rows, and what moves there. `kept` owns copies of those without packed rows.
std::vector<Tensor> plan(const std::vector<Tensor>& tensors, int64_t rows, std::vector<Move>& moves,
                         std::vector<Tensor>& kept) {
  std::vector<Tensor> results;
  for (const Tensor& t : tensors) {
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    int64_t elements = 1;
    bool packed = true;
    for (int64_t d = t.dim() - 1; d > 0; --d) {
      packed &= t.size(d) == 1 || t.stride(d) == elements;
      elements *= t.size(d);
    }
    sizes[0] = rows;
    results.push_back(torch::stable::new_empty(t, sizes));
    const int64_t bytes = elements * int64_t(t.element_size());
    if (bytes == 0 || rows == 0) continue;
    kept.push_back(packed ? t : torch::stable::contiguous(t));
    Move m{static_cast<const char*>(kept.back().const_data_ptr()),
           static_cast<char*>(results.back().mutable_data_ptr()),
           kept.back().stride(0) * int64_t(t.element_size()), 0, 4};
    const auto fits = [&] {
      const int64_t word = int64_t(1) << m.log_word;
      return bytes % word == 0 && (m.stride % word == 0 || t.size(0) == 1) &&
             uintptr_t(m.from) % word == 0 && uintptr_t(m.to) % word == 0;
    };
    while (!fits()) --m.log_word;
    m.words = bytes >> m.log_word;
    moves.push_back(m);
  }
  return results;
}

Moves part_of(const std::vector<Move>& moves, size_t first) {
  Moves part{};
  for (size_t i = first; i < moves.size() && part.count < kMostMoves; ++i)
    part.move[part.count++] = moves[i];
  return part;
}

void launch_gather(const std::vector<Move>& moves, size_t first, const Tensor& indices,
                   int64_t tokens) {
  const int64_t rows = indices.size(0), warps = kMoveThreads / kWarp;
  const int64_t blocks =
      std::min((rows + warps - 1) / warps, kBlocksPerProcessor * processors(indices));
  for (; first < moves.size(); first += kMostMoves) {
    gather_kernel<<<unsigned(blocks), kMoveThreads, 0, current_stream(indices)>>>(
        static_cast<const int64_t*>(indices.const_data_ptr()), rows, tokens, part_of(moves, first));
    check_launch("gather_tokens");
  }
}

}  // namespace

std::vector<Tensor> gather_tokens_cuda(const std::vector<Tensor>& tensors, const Tensor& indices) {
  STD_TORCH_CHECK(!tensors.empty() && indices.dim() == 1 &&
                      indices.scalar_type() == ScalarType::Long,
                  "gather_tokens: tensors must be one or more of [T, ...], indices int64 [N]");
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == tensors[0].size(0) &&
                        t.get_device_index() == indices.get_device_index(),
                    "gather_tokens: tensors must be [T, ...] of one T, and on one device");
  const DeviceGuard guard(indices.get_device_index());
  const Tensor chosen = as_contiguous(indices);
  std::vector<Move> moves;
  std::vector<Tensor> kept;
  std::vector<Tensor> results = plan(tensors, chosen.size(0), moves, kept);
  launch_gather(moves, 0, chosen, tensors[0].size(0));
  return results;
}

// `total` must be given: it is where op.py lets the caller say it, and reads it back otherwise.
std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens_cuda(
    const Tensor& scores, const Tensor& cu_seqlens, std::optional<Tensor> protect,
    std::optional<Tensor> counts, double value, int64_t mode, std::optional<int64_t> total,
    const std::vector<Tensor>& tensors) {
  const bool wide = scores.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(scores.dim() == 1 && (wide || scores.scalar_type() == ScalarType::Float) &&
                      cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                      cu_seqlens.scalar_type() == ScalarType::Int,
                  "select_tokens: scores must be float32 or float64 [T], cu_seqlens int32 [B + 1]");
  const int64_t tokens = scores.size(0), sequences = cu_seqlens.size(0) - 1;
  const auto device = scores.get_device_index();
  STD_TORCH_CHECK(tokens <= INT32_MAX && cu_seqlens.get_device_index() == device,
                  "select_tokens: at most 2^31 - 1 tokens, and tensors on one device");
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == tokens && t.get_device_index() == device,
                    "select_tokens: tensors must be [T, ...] with T as in scores, on one device");
  const DeviceGuard guard(device);
  const Tensor values = as_contiguous(scores), cu = as_contiguous(cu_seqlens);
  Selection p{values.const_data_ptr(), static_cast<const int32_t*>(cu.const_data_ptr())};
  if (protect) {
    STD_TORCH_CHECK(protect->sizes() == scores.sizes() &&
                        protect->scalar_type() == ScalarType::Bool &&
                        protect->get_device_index() == device,
                    "select_tokens: protect must be bool [T] like scores");
    protect = as_contiguous(*protect);
    p.protect = static_cast<const uint8_t*>(protect->const_data_ptr());
  }
  STD_TORCH_CHECK(mode == kFraction || mode == kThreshold || (mode == kCounts && counts),
                  "select_tokens: mode must be 0 (fraction), 1 (counts, given) or 2 (threshold)");
  if (mode == kCounts) {
    STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == sequences &&
                        counts->scalar_type() == ScalarType::Int &&
                        counts->get_device_index() == device,
                    "select_tokens: counts must be int32 [", sequences, "]");
    counts = as_contiguous(*counts);
    p.wanted = static_cast<const int32_t*>(counts->const_data_ptr());
  }
  STD_TORCH_CHECK(total && *total >= 0, "select_tokens: impl 'cuda' needs a total, not negative");
  const Tensor count_of = torch::stable::new_empty(cu, {sequences});
  const Tensor listed = torch::stable::new_empty(cu, {tokens});
  p.counts = static_cast<int32_t*>(count_of.mutable_data_ptr());
  p.listed = static_cast<int32_t*>(listed.mutable_data_ptr());
  p.tokens = tokens;
  p.sequences = int32_t(sequences);
  p.mode = int(mode);
  p.value = value;
  const cudaStream_t stream = current_stream(scores);
  if (sequences > 0) {
    if (wide) {
      select_kernel<double><<<unsigned(sequences), kSelectThreads, 0, stream>>>(p);
    } else {
      select_kernel<float><<<unsigned(sequences), kSelectThreads, 0, stream>>>(p);
    }
    check_launch("select_tokens");
  }
  Tensor indices = torch::stable::new_empty(scores, {*total}, ScalarType::Long);
  Tensor cu_kept = torch::stable::new_empty(cu, {sequences + 1});
  std::vector<Move> moves;
  std::vector<Tensor> kept;
  std::vector<Tensor> results = plan(tensors, *total, moves, kept);
  const Compaction c{p.cu,
                     p.counts,
                     p.listed,
                     static_cast<int64_t*>(indices.mutable_data_ptr()),
                     static_cast<int32_t*>(cu_kept.mutable_data_ptr()),
                     tokens,
                     *total,
                     p.sequences};
  const int64_t warps = kMoveThreads / kWarp;
  const int64_t blocks = std::max<int64_t>(
      1, std::min((*total + warps - 1) / warps, kBlocksPerProcessor * processors(scores)));
  compact_kernel<<<unsigned(blocks), kMoveThreads, 0, stream>>>(c, part_of(moves, 0));
  check_launch("select_tokens");
  if (*total > 0 && moves.size() > kMostMoves) launch_gather(moves, kMostMoves, indices, tokens);
  return {indices, cu_kept, results};
}

}  // namespace lean_kernels

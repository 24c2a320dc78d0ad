// SPDX-License-Identifier: Apache-2.0
// select_tokens, gather_tokens and scatter_tokens on CPU.
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"

namespace lean_kernels {
namespace {

enum Mode { kFraction, kCounts, kThreshold };  // the position in op.MODES

constexpr int64_t kSerialTokens = 2048;      // selected: a second thread costs more below this
constexpr int64_t kTaskTokens = 1024;        // selected by one task, about
constexpr int64_t kSerialBytes = 1 << 16;    // moved: the same
constexpr int64_t kTaskBytes = 1 << 18;
constexpr int64_t kStreamBytes = 1 << 23;   // written: past the caches from here on
constexpr int64_t kAhead = 2;              // rows fetched before their turn
constexpr double kSlack = 1e-6;  // 0.07 * 100 is above 7 in floating point, and 7 is meant

// The rows of a [T, ...] tensor, each contiguous.
struct TokenRows {
  Tensor tensor;
  int64_t count, bytes, stride;  // bytes of a row, and from row to row

  TokenRows(const Tensor& t, const char* op) : tensor(t) {
    STD_TORCH_CHECK(t.dim() >= 1, op, ": tensors must be [T, ...], got one without dimensions");
    const int64_t width = t.element_size();
    int64_t elements = 1;
    bool packed = true;
    for (int64_t d = t.dim() - 1; d > 0; --d) {
      packed &= t.size(d) == 1 || t.stride(d) == elements;
      elements *= t.size(d);
    }
    count = t.size(0);
    bytes = elements * width;
    if (packed) {
      stride = t.stride(0) * width;
    } else {
      tensor = torch::stable::contiguous(t);
      stride = bytes;
    }
  }
  const char* begin() const { return static_cast<const char*>(tensor.const_data_ptr()); }
};

struct Indices {
  Tensor tensor;
  const int64_t* data;
  int64_t count;

  Indices(const Tensor& t, int64_t rows, const char* op) : tensor(t) {
    STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Long, op,
                    ": indices must be int64 [N]");
    tensor = as_contiguous(t);
    data = static_cast<const int64_t*>(tensor.const_data_ptr());
    count = t.size(0);
    uint64_t largest = 0;  // a negative index becomes a huge one
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint64_t(data[i]));
    STD_TORCH_CHECK(count == 0 || largest < uint64_t(rows), op, ": indices must lie in [0, ", rows,
                    "), the number of tokens");
  }
};

std::vector<int64_t> with_rows(const Tensor& t, int64_t rows) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[0] = rows;
  return sizes;
}

// task(begin, end) over `rows` rows of `bytes` each.
template <class F>
void run_rows(int64_t rows, int64_t bytes, const F& task) {
  if (rows == 0 || bytes == 0) return;
  const int64_t threads = rows * bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  const int64_t step = std::max<int64_t>(1, std::min(kTaskBytes / bytes, ceil_div(rows, threads)));
  run_tasks(ceil_div(rows, step), threads,
            [&](int64_t i) { task(i * step, std::min(rows, (i + 1) * step)); });
}

// Moves rows to where nothing is read first. Many rows go past the caches, which would otherwise
// read the lines they are about to overwrite.
class RowWriter {
 public:
  RowWriter(int64_t rows, int64_t bytes, const void* to)
      : bytes_(bytes),
        stream_(rows * bytes >= kStreamBytes && bytes % 16 == 0 && uintptr_t(to) % 16 == 0) {}

  // `next`: a row soon to be copied.
  void copy(char* to, const char* from, const char* next) const {
#if defined(__x86_64__)
    if (stream_) {
      for (int64_t i = 0; i < bytes_; i += 16) {
        if (i % 64 == 0) _mm_prefetch(next + i, _MM_HINT_T0);
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
      }
      return;
    }
#endif
    std::memcpy(to, from, bytes_);
  }
  void zero(char* to) const {
#if defined(__x86_64__)
    if (stream_) {
      for (int64_t i = 0; i < bytes_; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
      return;
    }
#endif
    std::memset(to, 0, bytes_);
  }
  // Before another thread may read what was written.
  void finish() const {
#if defined(__x86_64__)
    if (stream_) _mm_sfence();
#endif
  }

 private:
  int64_t bytes_;
  bool stream_;
};

// Which of the N packed rows each of `total` rows is, or -1.
std::vector<int64_t> inverse(const Indices& indices, int64_t total) {
  std::vector<int64_t> from(total, -1);
  bool repeated = false;
  for (int64_t i = 0; i < indices.count; ++i) {
    int64_t& at = from[indices.data[i]];
    repeated |= at >= 0;
    at = i;
  }
  STD_TORCH_CHECK(!repeated, "scatter_tokens: indices must not repeat; of two rows with the same "
                             "index only one could be kept");
  return from;
}

TokenRows packed_rows(const Tensor& packed, const Tensor& indices) {
  const TokenRows rows(packed, "scatter_tokens");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.size(0) == rows.count,
                  "scatter_tokens: packed must be [N, ...] and indices [N], got ", rows.count,
                  " rows");
  return rows;
}

// The kept tokens' numbers, and where each sequence's begin.
std::tuple<Tensor, Tensor> select(const Tensor& scores, const Tensor& cu_seqlens,
                                  std::optional<Tensor> protect, std::optional<Tensor> counts,
                                  double value, int64_t mode, std::optional<int64_t> total) {
  STD_TORCH_CHECK(scores.dim() == 1 && (scores.scalar_type() == ScalarType::Float ||
                                        scores.scalar_type() == ScalarType::Double),
                  "select_tokens: scores must be float32 or float64 [T]");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                      cu_seqlens.scalar_type() == ScalarType::Int,
                  "select_tokens: cu_seqlens must be int32 [B + 1]");
  STD_TORCH_CHECK(mode == kFraction || mode == kThreshold || (mode == kCounts && counts),
                  "select_tokens: mode must be 0 (fraction), 1 (counts, given) or 2 (threshold)");
  const Tensor rows = as_contiguous(scores), cu_rows = as_contiguous(cu_seqlens);
  const int64_t tokens = scores.size(0), sequences = cu_seqlens.size(0) - 1;
  const int32_t* cu = static_cast<const int32_t*>(cu_rows.const_data_ptr());
  bool rises = cu[0] == 0 && cu[sequences] == tokens;
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    rises &= cu[b] <= cu[b + 1];
    longest = std::max<int64_t>(longest, int64_t(cu[b + 1]) - cu[b]);
  }
  STD_TORCH_CHECK(rises, "select_tokens: cu_seqlens must rise from 0 to the number of tokens, ",
                  tokens);
  TokenScores p{rows.const_data_ptr(), nullptr};
  if (protect) {
    STD_TORCH_CHECK(protect->sizes() == scores.sizes() &&
                        protect->scalar_type() == ScalarType::Bool,
                    "select_tokens: protect must be bool [T] like scores");
    protect = as_contiguous(*protect);
    p.protect = static_cast<const uint8_t*>(protect->const_data_ptr());
  }
  const int32_t* wanted = nullptr;
  if (mode == kCounts) {
    STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == sequences &&
                        counts->scalar_type() == ScalarType::Int,
                    "select_tokens: counts must be int32 [", sequences, "]");
    counts = as_contiguous(*counts);
    wanted = static_cast<const int32_t*>(counts->const_data_ptr());
  }

  const SelectionKernels& kernels =
      cpu_kernels().selection[scores.scalar_type() == ScalarType::Double];
  const int64_t threads = tokens < kSerialTokens ? 1 : torch::stable::get_num_threads();
  const int64_t tasks = std::max<int64_t>(1, std::min(sequences, tokens / kTaskTokens));
  const auto each_sequence = [&](const auto& f) {
    run_tasks(tasks, threads, [&](int64_t i) {
      for (int64_t b = sequences * i / tasks; b < sequences * (i + 1) / tasks; ++b)
        if (cu[b] < cu[b + 1]) f(b);
    });
  };
  Tensor cu_kept = torch::stable::new_empty(cu_seqlens, {sequences + 1});
  int32_t* kept = static_cast<int32_t*>(cu_kept.mutable_data_ptr());
  std::memset(kept, 0, (sequences + 1) * sizeof(int32_t));
  each_sequence([&](int64_t b) {
    const int64_t begin = cu[b], end = cu[b + 1], length = end - begin;
    int64_t count;
    if (mode == kThreshold) {
      count = kernels.count_above(p, begin, end, value);
    } else {
      int64_t guarded = 1;
      if (p.protect) {
        guarded = 0;
        for (int64_t i = begin; i < end; ++i) guarded += p.protect[i] != 0;
      }
      count = wanted ? std::max(wanted[b], 0)
                     : std::max<int64_t>(1, int64_t(std::ceil(value * double(length) - kSlack)));
      count = std::max(guarded, std::min(count, length));
    }
    kept[b + 1] = int32_t(count);
  });
  for (int64_t b = 0; b < sequences; ++b) kept[b + 1] += kept[b];
  STD_TORCH_CHECK(!total || *total == kept[sequences], "select_tokens: total is ",
                  total ? *total : 0, ", but ", kept[sequences], " tokens are kept");
  Tensor indices = torch::stable::new_empty(scores, {int64_t(kept[sequences])}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  each_sequence([&](int64_t b) {
    if (mode == kThreshold) {
      kernels.above(p, cu[b], cu[b + 1], value, out + kept[b]);
    } else {
      kernels.best(p, cu[b], cu[b + 1], kept[b + 1] - kept[b], out + kept[b],
                   thread_scratch(kernels.scratch(longest)));
    }
  });
  return {indices, cu_kept};
}

}  // namespace

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 1,
                  "gather_tokens: tensors must be one or more of [T, ...]");
  const int64_t tokens = tensors[0].size(0);
  const Indices chosen(indices, tokens, "gather_tokens");
  struct Copy {
    const char* from;
    char* to;
    int64_t stride, bytes;
    RowWriter writer;
  };
  std::vector<TokenRows> sources;
  std::vector<Tensor> results;
  std::vector<Copy> copies;
  int64_t bytes = 0;
  for (const Tensor& t : tensors) {
    const TokenRows& rows = sources.emplace_back(t, "gather_tokens");
    STD_TORCH_CHECK(rows.count == tokens, "gather_tokens: tensors must have the same number of "
                    "tokens, got ", tokens, " and ", rows.count);
    results.push_back(torch::stable::new_empty(t, with_rows(t, chosen.count)));
    char* to = static_cast<char*>(results.back().mutable_data_ptr());
    if (rows.bytes > 0)
      copies.push_back({rows.begin(), to, rows.stride, rows.bytes,
                        RowWriter(chosen.count, rows.bytes, to)});
    bytes += rows.bytes;
  }
  run_rows(chosen.count, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = chosen.data[i], next = chosen.data[std::min(i + kAhead, end - 1)];
      for (const Copy& c : copies)
        c.writer.copy(c.to + i * c.bytes, c.from + row * c.stride, c.from + next * c.stride);
    }
    for (const Copy& c : copies) c.writer.finish();
  });
  return results;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> select_tokens(
    const Tensor& scores, const Tensor& cu_seqlens, std::optional<Tensor> protect,
    std::optional<Tensor> counts, double value, int64_t mode, std::optional<int64_t> total,
    const std::vector<Tensor>& tensors) {
  const auto [indices, cu_kept] =
      select(scores, cu_seqlens, protect, counts, value, mode, total);
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == scores.size(0),
                    "select_tokens: tensors must be [T, ...] with T as in scores");
  return {indices, cu_kept,
          tensors.empty() ? std::vector<Tensor>() : gather_tokens(tensors, indices)};
}

Tensor scatter_tokens(const Tensor& packed, const Tensor& indices, int64_t total) {
  STD_TORCH_CHECK(total >= 0, "scatter_tokens: total must not be negative, got ", total);
  const TokenRows rows = packed_rows(packed, indices);
  const std::vector<int64_t> from = inverse(Indices(indices, total, "scatter_tokens"), total);
  Tensor out = torch::stable::new_empty(packed, with_rows(packed, total));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* data = rows.begin();
  const RowWriter writer(total, rows.bytes, to);
  run_rows(total, rows.bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (from[i] >= 0) {
        const int64_t next = std::min(from[i] + kAhead, rows.count - 1);
        writer.copy(to + i * rows.bytes, data + from[i] * rows.stride, data + next * rows.stride);
      } else {
        writer.zero(to + i * rows.bytes);
      }
    }
    writer.finish();
  });
  return out;
}

void scatter_tokens_into(const Tensor& out, const Tensor& packed, const Tensor& indices) {
  const TokenRows rows = packed_rows(packed, indices);
  STD_TORCH_CHECK(out.dim() == packed.dim() && out.scalar_type() == packed.scalar_type() &&
                      with_rows(out, 0) == with_rows(packed, 0),
                  "scatter_tokens: out must be [total, ...] with packed's row shape and dtype");
  const Indices chosen(indices, out.size(0), "scatter_tokens");
  inverse(chosen, out.size(0));
  const TokenRows target(out, "scatter_tokens");
  STD_TORCH_CHECK(target.tensor.const_data_ptr() == out.const_data_ptr(),
                  "scatter_tokens: each row of out must be contiguous");
  char* to = static_cast<char*>(const_cast<void*>(out.const_data_ptr()));
  run_rows(chosen.count, rows.bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to + chosen.data[i] * target.stride, rows.begin() + i * rows.stride, rows.bytes);
  });
}

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// tensor_train_embedding on CPU: checks, rows in order and each once, tasks for torch's threads.
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"
#include "segments.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "tensor_train_embedding";
constexpr int64_t kTaskRows = 32;     // distinct ones: a task begins with products of its own
constexpr int64_t kPartRows = 256;    // of backward, of which each part has gradients of its own
constexpr int64_t kMostParts = 16;

struct Cores {
  TensorTrain tt{};
  std::vector<Tensor> tensors;  // accumulators
  Dtype dtype;
  int64_t rows = 1;

  Cores(const std::vector<Tensor>& cores, int64_t features) {
    STD_TORCH_CHECK(cores.size() >= 2 && cores.size() <= size_t(kMostCores), kOp,
                    ": expected 2 to 4 cores, got ", int64_t(cores.size()));
    dtype = dtype_of(cores[0], kOp);
    const ScalarType wide = dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
    tt.order = int(cores.size());
    tt.ranks[0] = 1;
    int64_t width = 1;
    for (int k = 0; k < tt.order; ++k) {
      const Tensor& core = cores[k];
      STD_TORCH_CHECK(core.dim() == 4 && core.scalar_type() == cores[0].scalar_type() &&
                          core.size(1) == tt.ranks[k] && core.numel() > 0,
                      kOp, ": core ", int64_t(k), " must be [v, r, d, r'], none of them 0, in the "
                      "dtype of the first, r as r' of the core before");
      tt.rows[k] = core.size(0);
      tt.cols[k] = core.size(2);
      tt.ranks[k + 1] = core.size(3);
      STD_TORCH_CHECK(!__builtin_mul_overflow(rows, tt.rows[k], &rows) &&
                          !__builtin_mul_overflow(width, tt.cols[k], &width),
                      kOp, ": more than 2^63 rows or columns");
      tensors.push_back(as_contiguous(
          core.scalar_type() == wide ? core : torch::stable::to(core, wide)));
      tt.cores[k] = tensors[k].const_data_ptr();
    }
    STD_TORCH_CHECK(tt.ranks[tt.order] == 1, kOp, ": the last core's second rank must be 1");
    STD_TORCH_CHECK(1 <= features && features <= width, kOp, ": embedding_dim must lie in [1, ",
                    width, "], the columns of the cores");
    tt.features = features;
  }
};

// Which rows occur, and where.
struct Rising {
  std::vector<int64_t> rows, starts, places;

  Rising(const Tensor& ids, int64_t limit, int64_t skip) {
    const bool narrow = ids.scalar_type() == ScalarType::Int;
    STD_TORCH_CHECK(narrow || ids.scalar_type() == ScalarType::Long, kOp,
                    ": ids must be int32 or int64");
    const Tensor dense = as_contiguous(ids);
    const void* data = dense.const_data_ptr();
    const int64_t count = ids.numel();
    std::vector<Occurrence> found;
    found.reserve(count);
    uint64_t largest = 0;  // a negative id becomes a huge one
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = narrow ? static_cast<const int32_t*>(data)[i]
                                 : static_cast<const int64_t*>(data)[i];
      largest = std::max(largest, uint64_t(row));
      if (row != skip) found.push_back({row, i});
    }
    STD_TORCH_CHECK(count == 0 || largest < uint64_t(limit), kOp, ": ids must lie in [0, ", limit,
                    "), the rows of the table");
    sort_by_row(found, limit);
    places.reserve(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
      if (i == 0 || found[i].row != found[i - 1].row) {
        rows.push_back(found[i].row);
        starts.push_back(int64_t(i));
      }
      places.push_back(found[i].place);
    }
    starts.push_back(int64_t(found.size()));
  }
  Wanted wanted() const { return {rows.data(), starts.data(), places.data()}; }
};

}  // namespace

Tensor tensor_train_embedding(const Tensor& ids, const std::vector<Tensor>& cores,
                              int64_t num_embeddings, int64_t embedding_dim) {
  const Cores c(cores, embedding_dim);
  STD_TORCH_CHECK(0 <= num_embeddings && num_embeddings <= c.rows, kOp,
                  ": num_embeddings must lie in [0, ", c.rows, "], the rows of the cores");
  const Rising rising(ids, num_embeddings, -1);
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(embedding_dim);
  Tensor y = torch::stable::new_empty(cores[0], sizes);
  void* out = y.mutable_data_ptr();
  const TensorTrainKernels& kernels = cpu_kernels().tensor_train[c.dtype];
  const int64_t count = rising.rows.size(), threads = torch::stable::get_num_threads();
  const int64_t tasks = std::max<int64_t>(1, std::min(count / kTaskRows, 4 * threads));
  run_tasks(tasks, threads, [&](int64_t t) {
    kernels.forward(c.tt, rising.wanted(), count * t / tasks, count * (t + 1) / tasks, out,
                    thread_scratch(kernels.scratch(c.tt)));
  });
  return y;
}

std::vector<Tensor> tensor_train_embedding_grad(const Tensor& grad, const Tensor& ids,
                                                const std::vector<Tensor>& cores,
                                                int64_t num_embeddings, int64_t padding_idx,
                                                bool by_frequency) {
  STD_TORCH_CHECK(grad.dim() == ids.dim() + 1 && grad.scalar_type() == cores.at(0).scalar_type(),
                  kOp, ": grad must be [..., D] for ids [...], in the dtype of the cores");
  Cores c(cores, grad.size(ids.dim()));
  STD_TORCH_CHECK(grad.numel() == ids.numel() * c.tt.features && 0 <= num_embeddings &&
                      num_embeddings <= c.rows,
                  kOp, ": grad must be [..., D] for ids [...], and num_embeddings in [0, ", c.rows,
                  "]");
  const Rising rising(ids, num_embeddings, padding_idx);
  std::vector<Tensor> transposed, sums;
  const int order = c.tt.order;
  const int64_t count = rising.rows.size();
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(count, kPartRows), kMostParts));
  for (int k = 0; k < order; ++k) {
    const int64_t rows = c.tt.rows[k], rank = c.tt.ranks[k];
    const int64_t width = c.tt.cols[k] * c.tt.ranks[k + 1];
    const Tensor slices = torch::stable::view(c.tensors[k], {rows, rank, width});
    const auto turned = [&] { return torch::stable::transpose(slices, 1, 2); };
    transposed.push_back(k == 0 ? slices : torch::stable::contiguous(turned()));
    c.tt.transposed[k] = transposed[k].const_data_ptr();
    sums.push_back(torch::stable::new_zeros(c.tensors[k], {parts, rows * rank * width}));
  }
  const Tensor upstream = as_contiguous(grad);
  const TensorTrainKernels& kernels = cpu_kernels().tensor_train[c.dtype];
  const int64_t threads = torch::stable::get_num_threads();
  run_tasks(parts, threads, [&](int64_t part) {
    void* grads[kMostCores];
    for (int k = 0; k < order; ++k)
      grads[k] = static_cast<char*>(sums[k].mutable_data_ptr()) +
                 part * sums[k].size(1) * sums[k].element_size();
    kernels.backward(c.tt, rising.wanted(), count * part / parts, count * (part + 1) / parts,
                     upstream.const_data_ptr(), by_frequency, grads,
                     thread_scratch(kernels.scratch(c.tt)));
  });
  std::vector<Tensor> results;
  for (int k = 0; k < order; ++k) {
    const int64_t size = sums[k].size(1);
    const bool wide = c.dtype == kFloat64;
    void* data = sums[k].mutable_data_ptr();
    const int64_t tasks = std::max<int64_t>(1, std::min(threads, size >> 14));
    run_tasks(tasks, threads, [&](int64_t t) {
      const auto add = [&](auto* sum) {
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = size * t / tasks; i < size * (t + 1) / tasks; ++i)
            sum[i] += sum[part * size + i];
      };
      wide ? add(static_cast<double*>(data)) : add(static_cast<float*>(data));
    });
    const std::vector<int64_t> shape(cores[k].sizes().begin(), cores[k].sizes().end());
    const Tensor sum =
        torch::stable::reshape(torch::stable::narrow(sums[k], 0, 0, 1), shape);
    results.push_back(torch::stable::new_empty(cores[k], shape));
    torch::stable::copy_(results[k], sum);
  }
  return results;
}

}  // namespace lean_kernels

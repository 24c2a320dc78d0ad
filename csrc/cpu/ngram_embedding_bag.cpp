// SPDX-License-Identifier: Apache-2.0
// ngram_embedding_bag on CPU. Forward and backward are one thing, sums of listed rows: of the
// table's rows per bag, and of the gradient's rows per row of the table that occurs.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"
#include "segments.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "ngram_embedding_bag";
constexpr int64_t kPiece = 512;            // entries one sum runs over, for its rounding's sake too
constexpr int64_t kTaskBytes = 1 << 18;    // read: tasks small enough to balance, no smaller
constexpr int64_t kSerialBytes = 1 << 16;  // read: a second thread costs more below this

// An int32 or int64 vector as int64.
Tensor as_int64(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && (t.scalar_type() == ScalarType::Int ||
                                   t.scalar_type() == ScalarType::Long),
                  kOp, ": ", name, " must be int32 or int64, of one dimension");
  return as_contiguous(t.scalar_type() == ScalarType::Long
                           ? t
                           : torch::stable::to(t, ScalarType::Long));
}

struct Bags {
  Tensor ids_tensor, offsets_tensor;
  const int64_t *ids, *offsets;
  int64_t count, bags, skip;

  Bags(const Tensor& ids_, const Tensor& offsets_, int64_t rows, int64_t padding_idx)
      : ids_tensor(as_int64(ids_, "ids")),
        offsets_tensor(as_int64(offsets_, "offsets")),
        ids(static_cast<const int64_t*>(ids_tensor.const_data_ptr())),
        offsets(static_cast<const int64_t*>(offsets_tensor.const_data_ptr())),
        count(ids_.size(0)),
        bags(offsets_.size(0) - 1),
        skip(padding_idx) {
    STD_TORCH_CHECK(bags >= 0, kOp, ": offsets must be [B + 1], got [0]");
    bool rises = offsets[0] == 0 && offsets[bags] == count;
    for (int64_t b = 0; b < bags; ++b) rises &= offsets[b] <= offsets[b + 1];
    STD_TORCH_CHECK(rises, kOp, ": offsets must rise from 0 to the number of ids, ", count);
    uint64_t largest = 0;  // a negative id becomes a huge one
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint64_t(ids[i]));
    STD_TORCH_CHECK(count == 0 || largest < uint64_t(rows), kOp, ": ids must lie in [0, ", rows,
                    "), the rows of table");
  }

  double factor(int64_t bag, bool mean) const {
    if (!mean) return 1;
    int64_t live = offsets[bag + 1] - offsets[bag];
    if (skip >= 0)
      for (int64_t i = offsets[bag]; i < offsets[bag + 1]; ++i) live -= ids[i] == skip;
    return live ? 1 / double(live) : 0;
  }
};

int kind_of(const Tensor& table) {
  return table.scalar_type() == ScalarType::Char ? int(kDtypes) : int(dtype_of(table, kOp));
}
ScalarType wide_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The table's rows; `scales` go with int8 ones.
NgramRows rows_of(const Rows& table, const std::optional<Tensor>& scales, int64_t skip) {
  const bool quantised = table.tensor.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(table.tensor.dim() == 2 && table.cols > 0, kOp, ": table must be [V, D]");
  STD_TORCH_CHECK(quantised == scales.has_value(), kOp, ": scales go with an int8 table only");
  STD_TORCH_CHECK(!scales || (scales->dim() == 1 && scales->size(0) == table.count &&
                              scales->scalar_type() == ScalarType::Float),
                  kOp, ": scales must be float32 [", table.count, "]");
  return {table.tensor.const_data_ptr(), table.stride, table.cols, nullptr, nullptr,
          scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr, skip};
}

std::optional<Tensor> as_weights(const std::optional<Tensor>& weights, int64_t count,
                                 ScalarType wide) {
  if (!weights) return weights;
  STD_TORCH_CHECK(weights->dim() == 1 && weights->size(0) == count, kOp, ": weights must be [",
                  count, "], one per id");
  return as_contiguous(weights->scalar_type() == wide ? *weights
                                                      : torch::stable::to(*weights, wide));
}

// Writes to out(s) the sum of the entries [offsets[s], offsets[s + 1]) times factor(s). Long
// segments are cut into pieces that depend on nothing else, whose sums are added in their order.
template <class Factor, class Out>
void sum_segments(const NgramRows& rows, int kind, const int64_t* offsets, int64_t segments,
                  int64_t row_bytes, const Factor& factor, const Out& out) {
  struct Task {
    int64_t first, last;  // segments, or
    int64_t piece;        // of the long segment `first`
    int64_t partial;      // the place of the piece's sum, or -1
  };
  std::vector<Task> tasks;
  std::vector<std::pair<int64_t, int64_t>> long_ones;  // segment, its first partial sum
  const int64_t task_entries = std::max<int64_t>(1, kTaskBytes / row_bytes);
  int64_t partials = 0, from = 0, entries = 0;
  const auto close = [&](int64_t to) {
    if (from < to) tasks.push_back({from, to, 0, -1});
    from = to;
    entries = 0;
  };
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = offsets[s + 1] - offsets[s];
    if (length > kPiece) {
      close(s);
      long_ones.emplace_back(s, partials);
      for (int64_t i = 0; i * kPiece < length; ++i) tasks.push_back({s, s + 1, i, partials++});
      from = s + 1;
    } else if ((entries += length + 1) >= task_entries) {
      close(s + 1);
    }
  }
  close(segments);

  const bool wide = kind == kFloat64;
  const int64_t sums_bytes = rows.features * (wide ? 8 : 4);
  std::vector<char> sums(partials * sums_bytes);
  const NgramBagKernels& kernels = cpu_kernels().ngram_bag[kind];
  const int64_t total = segments ? offsets[segments] - offsets[0] + segments : 0;
  const int64_t threads = total * row_bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  run_tasks(tasks.size(), threads, [&](int64_t t) {
    const Task& task = tasks[t];
    if (task.partial >= 0) {
      const int64_t begin = offsets[task.first] + task.piece * kPiece;
      kernels.sum(rows, begin, std::min(begin + kPiece, offsets[task.last]),
                  sums.data() + task.partial * sums_bytes);
      return;
    }
    void* row = thread_scratch(sums_bytes);
    for (int64_t s = task.first; s < task.last; ++s) {
      kernels.sum(rows, offsets[s], offsets[s + 1], row);
      kernels.write(row, factor(s), rows.features, out(s));
    }
  });
  if (long_ones.empty()) return;
  std::vector<int64_t> order(partials);
  for (int64_t i = 0; i < partials; ++i) order[i] = i;
  const NgramRows pieces{sums.data(), rows.features, rows.features, order.data(),
                         nullptr,     nullptr,       -1};
  const NgramBagKernels& joining = cpu_kernels().ngram_bag[wide ? kFloat64 : kFloat32];
  run_tasks(long_ones.size(), threads, [&](int64_t i) {
    const auto [segment, first] = long_ones[i];
    const int64_t last = first + ceil_div(offsets[segment + 1] - offsets[segment], kPiece);
    void* row = thread_scratch(sums_bytes);
    joining.sum(pieces, first, last, row);
    kernels.write(row, factor(segment), rows.features, out(segment));
  });
}

// The transpose: for each row of the table that occurs, the bags it occurs in and with what weight.
struct Transposed {
  std::vector<int64_t> rows, offsets, bag;
  std::vector<char> weights;  // float32 or float64

  template <class A>
  void fill(const Bags& bags, const A* given, int64_t table_rows, bool mean) {
    std::vector<Occurrence> found;
    found.reserve(bags.count);
    std::vector<A> factors(bags.bags);
    std::vector<int64_t> bag_of(bags.count);
    for (int64_t b = 0; b < bags.bags; ++b) {
      factors[b] = A(bags.factor(b, mean));
      for (int64_t i = bags.offsets[b]; i < bags.offsets[b + 1]; ++i) {
        bag_of[i] = b;
        if (bags.ids[i] != bags.skip) found.push_back({bags.ids[i], i});
      }
    }
    sort_by_row(found, table_rows);
    bag.resize(found.size());
    weights.resize(found.size() * sizeof(A));
    A* weight = reinterpret_cast<A*>(weights.data());
    for (size_t i = 0; i < found.size(); ++i) {
      if (i == 0 || found[i].row != found[i - 1].row) {
        rows.push_back(found[i].row);
        offsets.push_back(int64_t(i));
      }
      bag[i] = bag_of[found[i].place];
      weight[i] = factors[bag[i]] * (given ? given[found[i].place] : A(1));
    }
    offsets.push_back(int64_t(found.size()));
  }
};

// Calls use(transposed, rows of the gradient, its kind).
template <class Use>
void with_transposed(const Tensor& grad, const Tensor& ids, const Tensor& offsets,
                     std::optional<Tensor> weights, int64_t table_rows, int64_t padding_idx,
                     bool mean, const Use& use) {
  STD_TORCH_CHECK(table_rows >= 0, kOp, ": the table's number of rows must not be negative");
  const Bags bags(ids, offsets, table_rows, padding_idx);
  const Rows rows(grad, kOp);
  STD_TORCH_CHECK(grad.dim() == 2 && rows.count == bags.bags && rows.cols > 0, kOp,
                  ": grad must be [", bags.bags, ", D]");
  const int kind = dtype_of(grad, kOp);
  weights = as_weights(weights, bags.count, wide_of(grad.scalar_type()));
  const void* given = weights ? weights->const_data_ptr() : nullptr;
  Transposed t;
  if (kind == kFloat64) {
    t.fill(bags, static_cast<const double*>(given), table_rows, mean);
  } else {
    t.fill(bags, static_cast<const float*>(given), table_rows, mean);
  }
  use(t, NgramRows{rows.tensor.const_data_ptr(), rows.stride, rows.cols, t.bag.data(),
                   t.weights.data(), nullptr, -1}, kind);
}

}  // namespace

Tensor ngram_embedding_bag(const Tensor& ids, const Tensor& offsets, const Tensor& table,
                           std::optional<Tensor> weights, std::optional<Tensor> scales,
                           int64_t padding_idx, bool mean) {
  const int kind = kind_of(table);
  const Rows in(table, kOp);
  if (scales) scales = as_contiguous(*scales);
  NgramRows rows = rows_of(in, scales, padding_idx);
  const Bags bags(ids, offsets, in.count, padding_idx);
  const ScalarType dtype = kind == kDtypes ? ScalarType::Float : table.scalar_type();
  weights = as_weights(weights, bags.count, wide_of(dtype));
  rows.weights = weights ? weights->const_data_ptr() : nullptr;
  rows.index = bags.ids;
  Tensor y = torch::stable::new_empty(table, {bags.bags, in.cols}, dtype);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t out_bytes = in.cols * y.element_size();
  sum_segments(
      rows, kind, bags.offsets, bags.bags, in.cols * table.element_size(),
      [&](int64_t b) { return bags.factor(b, mean); },
      [&](int64_t b) { return out + b * out_bytes; });
  return y;
}

Tensor ngram_embedding_bag_grad_table(const Tensor& grad, const Tensor& ids, const Tensor& offsets,
                                      std::optional<Tensor> weights, int64_t table_rows,
                                      int64_t padding_idx, bool mean) {
  std::optional<Tensor> result;
  with_transposed(
      grad, ids, offsets, weights, table_rows, padding_idx, mean,
      [&](const Transposed& t, const NgramRows& rows, int kind) {
        result = torch::stable::new_zeros(grad, {table_rows, rows.features});
        const int64_t bytes = rows.features * grad.element_size();
        char* out = static_cast<char*>(result->mutable_data_ptr());
        sum_segments(
            rows, kind, t.offsets.data(), int64_t(t.rows.size()), bytes,
            [](int64_t) { return 1.0; }, [&](int64_t s) { return out + t.rows[s] * bytes; });
      });
  return *result;
}

std::tuple<Tensor, Tensor> ngram_embedding_bag_grad_rows(
    const Tensor& grad, const Tensor& ids, const Tensor& offsets, std::optional<Tensor> weights,
    int64_t table_rows, int64_t padding_idx, bool mean) {
  std::optional<Tensor> which, values;
  with_transposed(
      grad, ids, offsets, weights, table_rows, padding_idx, mean,
      [&](const Transposed& t, const NgramRows& rows, int kind) {
        const int64_t count = t.rows.size(), bytes = rows.features * grad.element_size();
        which = torch::stable::new_empty(grad, {count}, ScalarType::Long);
        values = torch::stable::new_empty(grad, {count, rows.features});
        if (count) std::memcpy(which->mutable_data_ptr(), t.rows.data(), count * sizeof(int64_t));
        char* out = static_cast<char*>(values->mutable_data_ptr());
        sum_segments(
            rows, kind, t.offsets.data(), count, bytes, [](int64_t) { return 1.0; },
            [&](int64_t s) { return out + s * bytes; });
      });
  return {*which, *values};
}

Tensor ngram_embedding_bag_grad_weights(const Tensor& grad, const Tensor& ids,
                                        const Tensor& offsets, const Tensor& table,
                                        std::optional<Tensor> scales, int64_t padding_idx,
                                        bool mean) {
  const int kind = kind_of(table);
  const Rows in(table, kOp), upstream(grad, kOp);
  if (scales) scales = as_contiguous(*scales);
  NgramRows rows = rows_of(in, scales, padding_idx);
  const Bags bags(ids, offsets, in.count, padding_idx);
  const ScalarType dtype = kind == kDtypes ? ScalarType::Float : table.scalar_type();
  STD_TORCH_CHECK(grad.dim() == 2 && grad.scalar_type() == dtype && upstream.count == bags.bags &&
                      upstream.cols == in.cols,
                  kOp, ": grad must be [", bags.bags, ", ", in.cols, "] in the output's dtype");
  rows.index = bags.ids;
  Tensor result = torch::stable::new_empty(grad, {bags.count}, wide_of(dtype));
  void* out = result.mutable_data_ptr();
  const char* other = static_cast<const char*>(upstream.tensor.const_data_ptr());
  const int64_t other_bytes = upstream.stride * grad.element_size();
  const int64_t bytes = in.cols * table.element_size();
  const int64_t threads = bags.count * bytes < kSerialBytes ? 1 : torch::stable::get_num_threads();
  const int64_t tasks = std::min(bags.count, ceil_div(bags.count * bytes, kTaskBytes));
  const NgramBagKernels& kernels = cpu_kernels().ngram_bag[kind];
  run_tasks(tasks, threads, [&](int64_t t) {
    int64_t i = bags.count * t / tasks;
    const int64_t end = bags.count * (t + 1) / tasks;
    int64_t bag = std::upper_bound(bags.offsets, bags.offsets + bags.bags, i) - bags.offsets - 1;
    for (; i < end; ++bag) {
      const int64_t last = std::min(end, bags.offsets[bag + 1]);
      if (i < last)
        kernels.dot(rows, i, last, other + bag * other_bytes, bags.factor(bag, mean), out);
      i = std::max(i, last);
    }
  });
  return result;
}

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// tensor_product_embedding on CPU: checks, ids that occur again brought together, pieces of work
// dealt to torch's thread pool, and gradients summed in an order that no thread changes.
#include "tensor_product_embedding.h"

#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "embedding_host.h"
#include "groups.h"
#include "isa.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "tensor_product_embedding";
constexpr int64_t kTaskPieces = 16;            // small enough to balance, no smaller
constexpr int64_t kSerialWork = 1 << 19;       // multiply-adds: a second thread costs more below
constexpr int64_t kGroupedIds = 32;            // fewer are not worth bringing together
constexpr int64_t kScatteredBytes = 1 << 22;   // no prefetch helps rows out of order: stream more
constexpr int64_t kChunkPieces = 512;          // whose gradients are held at a time,
constexpr int64_t kChunkPositions = 1024;      // and of how many positions, where tables were added
constexpr int64_t kColumns = 256;              // of an added table's gradient, in one task

struct Table {
  TensorProduct p{};
  Tensor morphemes, factors;
  Dtype dtype;

  Table(const Tensor& indices, const Tensor& table, int64_t features)
      : morphemes(as_contiguous(indices)), factors(as_contiguous(table)),
        dtype(dtype_of(table, kOp)) {
    const ScalarType index = indices.scalar_type();
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(1) >= 2 && indices.size(1) <= kMostOrder &&
                        (index == ScalarType::Long || index == ScalarType::Int ||
                         index == ScalarType::Short),
                    kOp, ": morphemes must be int16, int32 or int64 [V, n], n from 2 to 4");
    STD_TORCH_CHECK(table.dim() == 3 && table.size(1) >= 1 && table.size(2) >= 1, kOp,
                    ": factors must be [M, r, q], r and q at least 1");
    p.morphemes = morphemes.const_data_ptr();
    p.morpheme_bytes = int(morphemes.element_size());
    p.factors = factors.const_data_ptr();
    p.count = table.size(0);
    p.rank = table.size(1);
    p.size = table.size(2);
    p.features = features;
    p.order = int(indices.size(1));
    // digits[k]: numbers a row would have from factor k on, or as many as it is cut to
    int64_t digits[kMostOrder + 1];
    digits[p.order] = 1;
    for (int k = p.order - 1; k >= 0; --k)
      digits[k] = digits[k + 1] > features / p.size ? features : digits[k + 1] * p.size;
    STD_TORCH_CHECK(features >= 1 && digits[0] >= features, kOp,
                    ": embedding_dim must lie in [1, q^n], got ", features);
    int64_t left = features;
    for (int k = 0; k < p.order; ++k) {
      p.used[k] = ceil_div(left, digits[k + 1]);
      left = std::min(left, digits[k + 1]);
    }
    p.width[p.order] = 1;
    for (int k = p.order - 1; k >= 0; --k) p.width[k] = p.used[k] * p.width[k + 1];
  }
};

void check_morphemes(bool right, const TensorProduct& p) {
  STD_TORCH_CHECK(right, kOp, ": morphemes must lie in [0, ", p.count, "), the rows of factors");
}

bool ascend(const Ids& ids) {
  for (int64_t i = 1; i < ids.count; ++i)
    if (ids[i] <= ids[i - 1]) return false;
  return true;
}

int64_t threads_for(const TensorProduct& p, int64_t rows, int64_t positions) {
  const int64_t work = (rows * p.rank + positions) * p.features;
  return work < kSerialWork ? 1 : torch::stable::get_num_threads();
}

}  // namespace

Tensor tensor_product_embedding(const Tensor& ids, const Tensor& morphemes, const Tensor& factors,
                                int64_t embedding_dim, Maybe ids0, Maybe table0, Maybe ids1,
                                Maybe table1, int64_t norm, Maybe weight, Maybe bias, double eps) {
  const Table table(morphemes, factors, embedding_dim);
  const TensorProduct& p = table.p;
  const Ids chosen(ids, morphemes.size(0), kOp, "ids");
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(embedding_dim);
  const Tensor out = torch::stable::new_empty(factors, sizes);
  const bool grouped = chosen.count >= kGroupedIds && !ascend(chosen);
  const RowEnd end(kOp, out, ids0, table0, ids1, table1, norm, weight, bias, eps,
                   grouped ? kScatteredBytes : kStreamBytes);
  const TensorProductKernels& kernels = cpu_kernels().tensor_product[table.dtype];
  const size_t bytes = kernels.scratch(p);
  std::atomic<bool> right{true};
  if (!grouped) {
    const int64_t threads = threads_for(p, chosen.count, chosen.count);
    run_tasks(ceil_div(chosen.count, kTaskPieces), threads, [&](int64_t task) {
      const int64_t begin = task * kTaskPieces, count = std::min(kTaskPieces, chosen.count - begin);
      Piece pieces[kTaskPieces];
      for (int64_t i = 0; i < count; ++i)
        pieces[i] = {chosen[begin + i], uint32_t(begin + i), uint32_t(begin + i + 1)};
      if (!kernels.rows(p, end.rows, pieces, count, nullptr, thread_scratch(bytes))) right = false;
    });
  } else {
    Pieces& work = thread_pieces();
    work.build(chosen);
    const int64_t pieces = work.count();
    const int64_t threads = threads_for(p, pieces, chosen.count);
    run_tasks(ceil_div(pieces, kTaskPieces), threads, [&](int64_t task) {
      const int64_t begin = task * kTaskPieces, count = std::min(kTaskPieces, pieces - begin);
      if (!kernels.rows(p, end.rows, work.pieces.data() + begin, count,
                        work.groups.positions.data(), thread_scratch(bytes)))
        right = false;
    });
  }
  check_morphemes(right, p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensor_product_embedding_grad(
    const Tensor& grad, const Tensor& ids, const Tensor& morphemes, const Tensor& factors,
    Maybe ids0, Maybe table0, Maybe ids1, Maybe table1, int64_t norm, Maybe weight, double eps,
    int64_t padding_idx) {
  STD_TORCH_CHECK(grad.dim() == ids.dim() + 1 && grad.scalar_type() == factors.scalar_type(), kOp,
                  ": grad must be [*ids.shape, D] in the factors' dtype");
  const int64_t features = grad.size(grad.dim() - 1);
  const Table table(morphemes, factors, features);
  const TensorProduct& p = table.p;
  const Ids chosen(ids, morphemes.size(0), kOp, "ids");
  STD_TORCH_CHECK(grad.numel() == chosen.count * features, kOp, ": grad must be [*ids.shape, D]");
  const Tensor upstream = as_contiguous(grad);
  const RowEnd end(kOp, upstream, ids0, table0, ids1, table1, norm, weight, std::nullopt, eps);
  const bool wide = table.dtype == kFloat64, added = ids0 || ids1;
  const ScalarType kind = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t itemsize = wide ? 8 : 4;
  const auto zeros = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_zeros(factors, sizes, kind);
  };
  const auto zeros_like = [&](const Maybe& t) {
    return t ? zeros({t->size(0), t->size(1)}) : zeros({0});
  };
  const Tensor dfactors = zeros({p.count, p.rank, p.size});
  const Tensor dtables[2] = {zeros_like(table0), zeros_like(table1)};
  const Tensor dnorm = zeros({2, norm ? features : 0});

  const TensorProductKernels& kernels = cpu_kernels().tensor_product[table.dtype];
  const size_t bytes = kernels.scratch(p);
  Pieces& work = thread_pieces();
  work.build(chosen, padding_idx);
  const uint32_t* positions = work.groups.positions.data();
  const int64_t pieces = work.count();
  const int64_t threads = threads_for(p, pieces, chosen.count), share = p.rank * p.size;
  const int64_t chunk = std::min(kChunkPieces, pieces), tasks = ceil_div(chunk, kTaskPieces);
  const Tensor shares = torch::stable::new_empty(factors, {chunk * p.order * share}, kind);
  const Tensor partial = torch::stable::new_empty(factors, {tasks, 2 * dnorm.size(1)}, kind);
  Tensor rows;
  if (added)
    rows = torch::stable::new_empty(
        factors, {std::min(chosen.count, kChunkPositions + Pieces::kMost) * features}, kind);
  std::atomic<bool> right{true};
  Groups same;
  std::vector<uint32_t> every;
  for (int64_t begin = 0, finish; begin < pieces && right; begin = finish) {
    const uint32_t first = work.pieces[begin].begin;
    for (finish = begin; finish < pieces && finish - begin < kChunkPieces; ++finish)
      if (added && work.pieces[finish].end - first > kChunkPositions && finish > begin) break;
    const int64_t count = finish - begin, used = ceil_div(count, kTaskPieces);
    TensorProductGrads out{upstream.const_data_ptr(), positions, nullptr, nullptr,
                           added ? rows.mutable_data_ptr() : nullptr, first};
    run_tasks(used, threads, [&](int64_t task) {
      TensorProductGrads mine = out;
      const int64_t at = task * kTaskPieces;
      mine.shares = static_cast<char*>(shares.mutable_data_ptr()) + at * p.order * share * itemsize;
      const int64_t sums = 2 * dnorm.size(1) * itemsize;
      mine.weight = static_cast<char*>(partial.mutable_data_ptr()) + task * sums;
      if (sums) std::memset(mine.weight, 0, sums);
      if (!kernels.grads(p, end.rows, mine, work.pieces.data() + begin + at,
                         std::min(kTaskPieces, count - at), thread_scratch(bytes)))
        right = false;
    });
    if (!right) break;
    every.resize(used);
    for (int64_t i = 0; i < used; ++i) every[i] = uint32_t(i);
    kernels.add_rows(partial.const_data_ptr(), every.data(), used, partial.size(1), partial.size(1),
                     dnorm.mutable_data_ptr());
    // Rows of `from` are added to the rows of `to` that their keys name.
    const auto add_grouped = [&](int64_t keyed, const auto& key, const Tensor& from,
                                 const Tensor& to, int64_t length) {
      same.build(keyed, key);
      const char* source = static_cast<const char*>(from.const_data_ptr());
      char* sums = static_cast<char*>(to.mutable_data_ptr());
      const int64_t columns = ceil_div(length, kColumns);
      const int64_t groups = ceil_div(same.count(), kTaskPieces);
      run_tasks(groups * columns, threads, [&](int64_t task) {
        const int64_t column = task % columns * kColumns, g = task / columns * kTaskPieces;
        for (int64_t i = g; i < std::min(g + kTaskPieces, same.count()); ++i)
          kernels.add_rows(source + column * itemsize, same.positions.data() + same.begins[i],
                           same.begins[i + 1] - same.begins[i], length,
                           std::min(kColumns, length - column),
                           sums + (same.keys[i] * length + column) * itemsize);
      });
    };
    add_grouped(count * p.order, [&](int64_t slot) {
      int64_t index[kMostOrder];
      p.morphemes_of(work.pieces[begin + slot / p.order].id, index);
      return index[slot % p.order];
    }, shares, dfactors, share);
    for (int t = 0; t < 2; ++t) {
      const AddedTable& ids_of = end.rows.added[t];
      if (!ids_of.ids) continue;
      add_grouped(work.pieces[finish - 1].end - first, [&](int64_t i) {
        return ids_of.row(positions[first + i]);
      }, rows, ids0 ? dtables[t] : dtables[1], features);
    }
  }
  check_morphemes(right, p);
  const auto copy = [&](int64_t row) {
    return torch::stable::clone(torch::stable::select(dnorm, 0, row));
  };
  return {dfactors, dtables[0], dtables[1], copy(0), copy(1)};
}

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// low_rank_embedding and its gradient on CPU: ids grouped, pieces dealt to torch's thread pool.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "embedding_host.h"
#include "groups.h"
#include "isa/activations.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "low_rank_embedding";
constexpr int64_t kScratchBytes = 3 << 16;   // of rows one task makes: they stay in L2
constexpr int64_t kGradBytes = 2 << 16;      // the same beside sums and gradients to come
constexpr int64_t kMostRows = 96;
constexpr int64_t kPackTask = 1 << 16;       // elements of the decoder
constexpr int64_t kFewPlaces = 2048;         // grouped sooner than a packed decoder is shared
constexpr int64_t kGroupedFlop = 2048;       // of a row: less costs no more than finding its copies
constexpr int64_t kPlaceFlop = 20;           // per feature, that a place takes as long as
constexpr int64_t kParts = 16;               // sums of the decoder's gradient made side by side
constexpr int64_t kPartBytes = 1 << 26;      // of all of them
constexpr int64_t kSumTask = 128;            // rows of codes or features
constexpr int kActivations[] = {kIdentity, kRelu, kGelu, kElu};

// Checked arguments; keeps alive what `p` points into.
struct Problem {
  LowRank p{};
  Dtype dtype;
  int64_t wide_bytes;  // of an accumulator
  const LowRankKernels& kernels;
  LowRankSizes sizes;
  Ids ids;

  Problem(const Tensor& id, const Tensor& codes, const Maybe& scales, const Tensor& decoder,
          const Maybe& bias, int64_t activation)
      : dtype(dtype_of(decoder, kOp)),
        wide_bytes(dtype == kFloat64 ? 8 : 4),
        kernels(cpu_kernels().low_rank[dtype]),
        ids(id, codes.dim() == 2 ? codes.size(0) : 0, kOp, "ids"),
        codes_(codes),
        decoder_(decoder) {
    STD_TORCH_CHECK(codes.dim() == 2 && decoder.dim() == 2 && codes.size(1) == decoder.size(1) &&
                        codes.size(1) > 0 && decoder.size(0) > 0,
                    kOp, ": codes must be [V, rank] and decoder [D, rank], neither empty");
    STD_TORCH_CHECK(codes.scalar_type() == (scales ? ScalarType::Char : decoder.scalar_type()), kOp,
                    ": codes must have the decoder's dtype, or be int8 with scales");
    STD_TORCH_CHECK(activation >= 0 && activation < int64_t(std::size(kActivations)), kOp,
                    ": activation must be a code from 0 to 3");
    if (codes_.stride(1) != 1) codes_ = torch::stable::contiguous(codes_);
    p.codes = codes_.const_data_ptr();
    p.code_stride = codes_.stride(0);
    if (scales) {
      STD_TORCH_CHECK(scales->dim() == 1 && scales->size(0) == codes.size(0) &&
                          scales->scalar_type() == ScalarType::Float,
                      kOp, ": scales must be float32 [V]");
      scales_ = as_contiguous(*scales);
      p.scales = static_cast<const float*>(scales_->const_data_ptr());
    }
    p.decoder = decoder.const_data_ptr();
    p.decoder_out = decoder.stride(0);
    p.decoder_in = decoder.stride(1);
    p.features = decoder.size(0);
    p.rank = decoder.size(1);
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.features &&
                          bias->scalar_type() == decoder.scalar_type(),
                      kOp, ": bias must be [D] in the decoder's dtype");
      bias_ = as_contiguous(*bias);
      p.bias = bias_->const_data_ptr();
    }
    p.activation = kActivations[activation];
    sizes = kernels.sizes(p);
  }

  int64_t threads_for(double flop) const {
    return flop < kSerialFlop ? 1 : torch::stable::get_num_threads();
  }

  // Memory of the calling thread for the packed decoder.
  void* pack_room() const { return thread_scratch<1>(sizes.packed * wide_bytes); }

  int64_t pack_tasks() const {
    return std::clamp<int64_t>(p.features * p.rank / kPackTask, 1, sizes.strips);
  }

  void* pack_alone() const {
    void* packed = pack_room();
    kernels.pack(p, 0, sizes.strips, packed);
    return packed;
  }

  // Packs in many tasks, and calls `meanwhile` in one of its own.
  template <class F>
  void* pack_and(int64_t threads, const F& meanwhile) const {
    void* packed = pack_room();
    const int64_t tasks = pack_tasks();
    run_tasks(1 + tasks, threads, [&](int64_t i) {
      if (i == 0) return meanwhile();
      kernels.pack(p, sizes.strips * (i - 1) / tasks, sizes.strips * i / tasks, packed);
    });
    return packed;
  }

  // Rows of a task: whole panels, that stay in L2.
  int64_t task_rows(int64_t bytes = kScratchBytes) const {
    const int64_t fit = bytes / (sizes.made_stride * wide_bytes) / sizes.panel_rows;
    return std::min(kMostRows, std::max<int64_t>(fit, 1) * sizes.panel_rows);
  }

  double flop(int64_t rows) const { return 2.0 * rows * p.features * p.rank; }

 private:
  Tensor codes_, decoder_;
  std::optional<Tensor> scales_, bias_;
};

}  // namespace

Tensor low_rank_embedding(const Tensor& ids, const Tensor& codes, Maybe scales,
                          const Tensor& decoder, Maybe bias, int64_t activation, Maybe ids0,
                          Maybe table0, Maybe ids1, Maybe table1, int64_t norm, Maybe norm_weight,
                          Maybe norm_bias, double eps) {
  Problem problem(ids, codes, scales, decoder, bias, activation);
  LowRank& p = problem.p;
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(p.features);
  Tensor out = torch::stable::new_empty(decoder, sizes);
  const RowEnd end(kOp, out, ids0, table0, ids1, table1, norm, norm_weight, norm_bias, eps);
  if (problem.ids.count == 0) return out;

  Pieces& work = thread_pieces();
  const int64_t places = problem.ids.count;
  int64_t rows = places;
  const int64_t threads = problem.threads_for(problem.flop(rows));
  std::vector<Piece> each;
  const auto group = [&] {
    if (rows > 1 && problem.flop(1) >= kGroupedFlop) {
      work.build(problem.ids);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        each.push_back({problem.ids[i], uint32_t(i), uint32_t(i + 1)});
    }
  };
  // A small decoder every thread packs for itself: to share it takes longer.
  void* shared = nullptr;
  if (problem.pack_tasks() > 1 || places > kFewPlaces) {
    shared = problem.pack_and(threads, group);
  } else {
    group();
  }
  p.pieces = each.data();
  if (each.empty()) {
    rows = work.count();
    p.pieces = work.pieces.data();
    p.positions = work.groups.positions.data();
  }
  int64_t tasks = ceil_div(rows, problem.task_rows());
  if (tasks < 4 * threads) tasks = std::min(rows, ceil_div(tasks, threads) * threads);
  // Tasks take as long, not as many rows: each place takes its time too, unless rows are just
  // copied there, beside the products.
  const int64_t place_flop = end.rows.plain() ? 0 : kPlaceFlop;
  const auto cost = [&](int64_t row, int64_t place) {
    return 2 * p.rank * row + place_flop * place;
  };
  const auto row_at = [&](int64_t task) {
    const int64_t before = cost(rows, places) * task / tasks;
    return std::partition_point(p.pieces, p.pieces + rows, [&](const Piece& piece) {
             return cost(&piece - p.pieces, piece.begin) < before;
           }) - p.pieces;
  };
  run_workers(tasks, threads, [&](const auto& each_task) {
    const void* packed = shared ? shared : problem.pack_alone();
    each_task([&](int64_t i) {
      const int64_t from = row_at(i), to = row_at(i + 1);
      if (from == to) return;
      const size_t positions = p.pieces[to - 1].end - p.pieces[from].begin;
      const LowRankSizes& sizes = problem.sizes;
      const size_t scratch =
          (to - from) * sizes.row_scratch + positions * sizes.position_scratch + sizes.slack;
      problem.kernels.rows(p, end.rows, packed, from, to,
                           thread_scratch(scratch * problem.wide_bytes));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_embedding_grad(
    const Tensor& grad, const Tensor& ids, const Tensor& codes, Maybe scales,
    const Tensor& decoder, Maybe bias, int64_t activation, int64_t padding_idx, bool by_frequency,
    bool sparse, bool need_codes, bool need_decoder, bool need_bias) {
  Problem problem(ids, codes, scales, decoder, bias, activation);
  LowRank& p = problem.p;
  const LowRankKernels& kernels = problem.kernels;
  const LowRankSizes& sizes = problem.sizes;
  const Rows in(grad, kOp);
  STD_TORCH_CHECK(in.cols == p.features && in.count == problem.ids.count &&
                      grad.scalar_type() == decoder.scalar_type() && !(scales && need_codes),
                  kOp, ": grad must have the shape and dtype of the rows, and int8 codes none");
  const double flop = problem.flop(in.count) * (need_codes + need_decoder) +
                      double(in.count) * p.features;
  const int64_t threads = problem.threads_for(flop);

  Pieces& work = thread_pieces();
  void* grad_packed =
      need_codes ? thread_scratch<2>(sizes.grad_packed * problem.wide_bytes) : nullptr;
  void* packed = nullptr;
  const auto prepare = [&](int64_t i) {
    if (i == 0) work.build(problem.ids, padding_idx);
    if (i == 1 && need_codes) kernels.grad_pack(p, grad_packed);
  };
  if (p.activation) {
    packed = problem.pack_and(threads, [&] { prepare(0), prepare(1); });
  } else {
    run_tasks(2, threads, prepare);
  }
  p.pieces = work.pieces.data();
  p.positions = work.groups.positions.data();
  const int64_t rows = work.count(), groups = work.groups.count(), rank = p.rank;
  std::vector<uint32_t> counts;
  if (by_frequency)
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t count = work.groups.begins[g + 1] - work.groups.begins[g];
      counts.insert(counts.end(), (count + Pieces::kMost - 1) / Pieces::kMost, count);
    }

  const auto result = [&](bool needed, std::vector<int64_t> shape, bool zero) {
    if (!needed) return torch::stable::new_empty(decoder, {0});
    return zero ? torch::stable::new_zeros(decoder, shape)
                : torch::stable::new_empty(decoder, shape);
  };
  const int64_t used = need_codes && sparse ? groups : 0;
  Tensor which = torch::stable::new_empty(ids, {used}, ScalarType::Long);
  Tensor d_codes = result(need_codes, {sparse ? groups : codes.size(0), rank}, !sparse);
  Tensor d_decoder = result(need_decoder, {p.features, rank}, rows == 0);
  Tensor d_bias = result(need_bias, {p.features}, rows == 0);
  if (rows == 0) return {which, d_codes, d_decoder, d_bias};

  // Each part sums its tiles in order, and the parts are summed in order: what they are must not
  // depend on the number of threads.
  const int64_t task_rows = problem.task_rows(kGradBytes), tiles = ceil_div(rows, task_rows);
  const int64_t part_size = need_decoder ? rank * sizes.made_stride : 0;
  const int64_t room = kPartBytes / std::max<int64_t>(1, part_size * problem.wide_bytes);
  const int64_t parts = std::min({tiles, kParts, std::max<int64_t>(room, 2)});
  const ScalarType wide = problem.dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
  const auto accumulators = [&](int64_t count) {
    return torch::stable::new_empty(decoder, {count}, wide);
  };
  Tensor decoders = accumulators(parts * part_size);
  Tensor biases = accumulators(need_bias ? parts * sizes.made_stride : 0);
  Tensor code_rows = accumulators(need_codes ? rows * sizes.padded_rank : 0);
  const auto at = [&](const Tensor& t, int64_t element) {
    return t.numel() ? static_cast<char*>(t.mutable_data_ptr()) + element * problem.wide_bytes
                     : nullptr;
  };
  LowRankGrad g{in.tensor.const_data_ptr(), in.stride, by_frequency ? counts.data() : nullptr,
                at(code_rows, 0)};
  std::vector<uint32_t> firsts;  // pieces of the ids, in the order of rows of d_codes
  const auto order = [&] {
    for (int64_t i = 0; i < rows; ++i)
      if (i == 0 || p.pieces[i].id != p.pieces[i - 1].id) firsts.push_back(uint32_t(i));
    if (sparse)
      std::sort(firsts.begin(), firsts.end(),
                [&](uint32_t a, uint32_t b) { return p.pieces[a].id < p.pieces[b].id; });
  };
  run_tasks(parts + need_codes, threads, [&](int64_t i) {
    if (i == parts) return order();
    const int64_t first = tiles * i / parts * task_rows;
    const int64_t last = std::min(rows, tiles * (i + 1) / parts * task_rows);
    for (int64_t begin = first; begin < last; begin += task_rows) {
      const int64_t end = std::min(last, begin + task_rows);
      const size_t scratch = (end - begin) * sizes.grad_row_scratch + sizes.slack;
      kernels.grad(p, g, packed, grad_packed, begin, end, std::min(last, end + task_rows),
                   begin > first, at(decoders, i * part_size), at(biases, i * sizes.made_stride),
                   thread_scratch(scratch * problem.wide_bytes));
    }
  });

  const int64_t code_tasks = ceil_div(firsts.size(), kSumTask);
  const int64_t decoder_tasks = need_decoder ? ceil_div(p.features, kSumTask) : 0;
  run_tasks(code_tasks + decoder_tasks, threads, [&](int64_t task) {
    if (task >= code_tasks) {
      const int64_t begin = (task - code_tasks) * kSumTask;
      kernels.sum_decoders(p, at(decoders, 0), parts, begin,
                           std::min(p.features, begin + kSumTask), d_decoder.mutable_data_ptr());
      return;
    }
    const int64_t end = std::min<int64_t>(groups, (task + 1) * kSumTask);
    for (int64_t row = task * kSumTask; row < end; ++row) {
      const int64_t first = firsts[row], id = p.pieces[first].id;
      int64_t last = first + 1;
      while (last < rows && p.pieces[last].id == id) ++last;
      if (sparse) static_cast<int64_t*>(which.mutable_data_ptr())[row] = id;
      kernels.sum(at(code_rows, first * sizes.padded_rank), last - first, sizes.padded_rank, rank,
                  static_cast<char*>(d_codes.mutable_data_ptr()) +
                      (sparse ? row : id) * rank * decoder.element_size());
    }
  });
  if (need_bias)
    kernels.sum(at(biases, 0), parts, sizes.made_stride, p.features, d_bias.mutable_data_ptr());
  return {which, d_codes, d_decoder, d_bias};
}

}  // namespace lean_kernels

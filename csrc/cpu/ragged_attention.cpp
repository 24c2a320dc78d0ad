// SPDX-License-Identifier: Apache-2.0
// ragged_attention and its gradients on CPU: tensors in, tasks out to torch's thread pool.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "ragged_attention";

// Query rows per task, a multiple of every chunk; a sequence has at most kMostSegments tasks per
// key head. Neither may depend on the number of threads: partial scores add up per task.
constexpr int64_t kSegmentRows = 288, kMostSegments = 8;
constexpr double kLeastUnitFlop = 5e5;  // of work handed out at a time
constexpr int64_t kFarthest = int64_t(1) << 33;  // beyond any distance of int32 positions

ScalarType wide_of(Dtype dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// An index tensor, contiguous.
struct Indices {
  std::optional<Tensor> tensor;
  const int32_t* data = nullptr;

  Indices(const Tensor& t, const char* name, int64_t size) : tensor(t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 &&
                        (size < 0 ? t.size(0) >= 1 : t.size(0) == size),
                    "ragged_attention: ", name, " must be int32 [",
                    size < 0 ? "B + 1" : std::to_string(size).c_str(), "]");
    tensor = as_contiguous(t);
    data = static_cast<const int32_t*>(tensor->const_data_ptr());
  }
  Indices() = default;
};

void check_rises(const int32_t* cu, int64_t batch, int64_t total, const char* name) {
  bool rises = cu[0] == 0 && cu[batch] == total;
  int64_t least = batch ? INT32_MAX : 0;
  for (int64_t b = 0; b < batch; ++b) least = std::min(least, int64_t(cu[b + 1]) - cu[b]);
  rises &= least >= 0;
  STD_TORCH_CHECK(rises, "ragged_attention: ", name, " must rise from 0 to the number of tokens, ",
                  total, "; got first ", cu[0], ", last ", cu[batch], ", smallest step ", least);
}

// A [T, heads, dim] tensor whose dim is contiguous: the tensor itself or a copy.
struct HeadRows {
  Tensor tensor;
  explicit HeadRows(const Tensor& t) : tensor(t) {
    if (t.size(2) != 1 && t.stride(2) != 1) tensor = torch::stable::contiguous(t);
  }
  Heads heads() const { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
};

// Everything a call's arguments say, checked.
struct Problem {
  HeadRows query, key, value;
  Indices cu, cu_k, positions, key_positions;
  int64_t batch, key_heads;
  Dtype dtype;
  Attention call;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
          const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& at,
          const std::optional<Tensor>& key_at, double scale, int64_t left, int64_t right,
          bool exclude_diagonal)
      : query((check(q, k, v), q)), key(k), value(v) {
    STD_TORCH_CHECK(cu_seqlens_k || k.size(0) == q.size(0), "ragged_attention: ", q.size(0),
                    " queries but ", k.size(0),
                    " keys: pass cu_seqlens_k where a sequence's keys are not its queries");
    STD_TORCH_CHECK(key_at.has_value() == (at.has_value() && cu_seqlens_k.has_value()),
                    "ragged_attention: key_positions goes with positions and cu_seqlens_k, and "
                    "only with both");
    cu = Indices(cu_seqlens, "cu_seqlens", -1);
    batch = cu_seqlens.size(0) - 1;
    check_rises(cu.data, batch, q.size(0), "cu_seqlens");
    cu_k = cu;
    if (cu_seqlens_k) {
      cu_k = Indices(*cu_seqlens_k, "cu_seqlens_k", batch + 1);
      check_rises(cu_k.data, batch, k.size(0), "cu_seqlens_k");
    }
    if (at) positions = Indices(*at, "positions", q.size(0));
    key_positions = key_at ? Indices(*key_at, "key_positions", k.size(0)) : positions;
    check_ascends(positions, cu, "positions");
    if (key_at) check_ascends(key_positions, cu_k, "key_positions");
    dtype = dtype_of(q, kOp);
    key_heads = k.size(1);
    call = Attention{};
    call.query = query.heads(), call.key = key.heads(), call.value = value.heads();
    call.heads = q.size(1), call.group = q.size(1) / key_heads, call.dim = q.size(2);
    call.scale = scale;
    call.left = std::min(left, kFarthest), call.right = std::min(right, kFarthest);
    call.positions = positions.data, call.key_positions = key_positions.data;
    call.exclude_diagonal = exclude_diagonal;
  }

  Sequence sequence(int64_t b) const {
    return {cu.data[b], cu.data[b + 1] - cu.data[b], cu_k.data[b],
            cu_k.data[b + 1] - cu_k.data[b]};
  }

 private:
  static void check(const Tensor& q, const Tensor& k, const Tensor& v) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.sizes() == k.sizes() &&
                        k.size(2) == q.size(2) && q.size(2) > 0 && q.size(1) > 0 &&
                        k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "ragged_attention: query must be [T, H, D], key and value [T_k, H_kv, D], and "
                    "H a multiple of H_kv");
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "ragged_attention: query, key and value must have the same dtype, got ",
                    toString(q.scalar_type()), ", ", toString(k.scalar_type()), " and ",
                    toString(v.scalar_type()));
  }

  void check_ascends(const Indices& at, const Indices& bounds, const char* name) const {
    if (!at.data) return;
    bool ascends = true;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = bounds.data[b] + 1; i < bounds.data[b + 1]; ++i)
        ascends &= at.data[i - 1] <= at.data[i];
    STD_TORCH_CHECK(ascends, "ragged_attention: ", name,
                    " must ascend within each sequence; sort the tokens kept by position");
  }
};

int64_t segments_of(const Sequence& s) {
  return std::min(ceil_div(s.rows, kSegmentRows), kMostSegments);
}
int64_t segment_at(const Sequence& s, int64_t i, int64_t segments) {
  const int64_t units = ceil_div(s.rows, kSegmentRows);
  return std::min(s.rows, units * i / segments * kSegmentRows);
}

double flop_of(const Attention& p, const AttentionTask& t) {
  const double rows = double(t.row_end - t.row_begin) * p.group;
  // Packing and bookkeeping cost about as much as a few more rows.
  return 4.0 * (rows + 8) * (t.key_end - t.key_begin + 4) * p.dim;
}

// Runs every task, each of `parts` for every key head, the longest first. Threads take several at a
// time, ever fewer as the work runs out.
template <class F>
void run_longest_first(const Attention& p, std::vector<AttentionTask>& parts, double weight,
                       const F& run) {
  const int64_t heads = p.heads / p.group, count = int64_t(parts.size()) * heads;
  const auto cost = [&](const AttentionTask& t) { return weight * flop_of(p, t); };
  std::stable_sort(parts.begin(), parts.end(),
                   [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  double left = 0;
  for (const AttentionTask& t : parts) left += heads * cost(t);
  const int64_t threads = left < kSerialFlop ? 1 : torch::stable::get_num_threads();
  std::vector<int64_t> units{0};
  double work = 0;
  for (int64_t i = 0; i < count && threads > 1; ++i) {
    work += cost(parts[i / heads]);
    if (work >= std::max(kLeastUnitFlop, left / double(4 * threads))) {
      units.push_back(i + 1);
      left -= work;
      work = 0;
    }
  }
  if (units.back() < count) units.push_back(count);
  const auto task = [&](int64_t i) {
    AttentionTask t = parts[i / heads];
    t.key_head = i % heads;
    return t;
  };
  run_tasks(int64_t(units.size()) - 1, threads, [&](int64_t unit) {
    const int64_t end = units[unit + 1];
    AttentionTask here = task(units[unit]);
    for (int64_t i = units[unit]; i < end; ++i) {
      const AttentionTask next = i + 1 < end ? task(i + 1) : here;
      run(here, i + 1 < end ? &next : nullptr);
      here = next;
    }
  });
}

// Adds up the partial scores of a sequence's heads and segments, always in that order.
template <class A>
void gather_scores(const A* partial, int64_t stride, const Sequence& s, int64_t at, int64_t heads,
                   bool per_head, bool mean, A* scores) {
  const int64_t segments = segments_of(s);
  const A share = mean && s.rows ? A(s.rows) * A(per_head ? 1 : heads) : A(1);
  std::vector<A> sums(s.keys);
  for (int64_t h = 0; h < heads; ++h) {
    if (h == 0 || per_head) std::fill(sums.begin(), sums.end(), A(0));
    for (int64_t i = 0; i < segments; ++i) {
      const A* from = partial + h * stride + at + i * s.keys;
      for (int64_t j = 0; j < s.keys; ++j) sums[j] += from[j];
    }
    if (per_head)
      for (int64_t j = 0; j < s.keys; ++j) scores[(s.key + j) * heads + h] = sums[j] / share;
  }
  if (!per_head)
    for (int64_t j = 0; j < s.keys; ++j) scores[s.key + j] = sums[j] / share;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ragged_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> positions,
    std::optional<Tensor> key_positions, int64_t, double scale, int64_t left, int64_t right,
    int64_t key_scores, bool per_head, bool exclude_diagonal) {
  Problem p(query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions, scale, left,
            right, exclude_diagonal);
  STD_TORCH_CHECK(key_scores >= 0 && key_scores <= 2,
                  "ragged_attention: key_scores must be a code from 0 to 2, got ", key_scores);
  Attention& call = p.call;
  const ScalarType wide = wide_of(p.dtype);
  Tensor out = torch::stable::new_empty(query, {query.size(0), call.heads, call.dim});
  Tensor lse = torch::stable::new_empty(query, {query.size(0), call.heads}, wide);
  call.out = out.mutable_data_ptr(), call.lse = lse.mutable_data_ptr();

  std::vector<AttentionTask> parts;
  std::vector<int64_t> scores_at(p.batch + 1);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequence(b);
    const int64_t segments = segments_of(s);
    for (int64_t i = 0; i < segments; ++i) {
      AttentionTask t{s, 0, segment_at(s, i, segments), segment_at(s, i + 1, segments), 0, 0,
                      scores_at[b] + i * s.keys};
      t.key_begin = keys_within(call, s, t.row_begin, call.left, call.right).begin;
      t.key_end = keys_within(call, s, t.row_end - 1, call.left, call.right).end;
      t.key_end = std::max(t.key_begin, t.key_end);
      parts.push_back(t);
    }
    scores_at[b + 1] = scores_at[b] + segments * s.keys;
  }
  std::optional<Tensor> partial;
  if (key_scores) {
    call.scores_head = scores_at[p.batch];
    partial = torch::stable::new_empty(query, {call.heads, call.scores_head}, wide);
    call.scores = partial->mutable_data_ptr();
  }
  const AttentionKernels& kernels = cpu_kernels().attention[p.dtype];
  run_longest_first(call, parts, 1, [&](const AttentionTask& t, const AttentionTask* next) {
    kernels.forward(call, t, next, thread_scratch(kernels.forward_scratch(call, t)));
  });

  const int64_t keys = key_scores ? key.size(0) : 0;
  Tensor scores = per_head ? torch::stable::new_empty(query, {keys, call.heads}, wide)
                           : torch::stable::new_empty(query, {keys}, wide);
  if (key_scores) {
    const auto gather = [&](int64_t b) {
      const Sequence s = p.sequence(b);
      const auto as = [&](auto zero) {
        using A = decltype(zero);
        gather_scores(static_cast<const A*>(call.scores), call.scores_head, s, scores_at[b],
                      call.heads, per_head, key_scores == 2,
                      static_cast<A*>(scores.mutable_data_ptr()));
      };
      p.dtype == kFloat64 ? as(double()) : as(float());
    };
    const double work = 8.0 * call.scores_head * call.heads;
    run_tasks(p.batch, work < kSerialFlop ? 1 : torch::stable::get_num_threads(), gather);
  }
  return {out, lse, scores};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_grad(
    const Tensor& grad_out, std::optional<Tensor> grad_scores, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor&, const Tensor&,
    const Tensor& cu_seqlens, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> positions,
    std::optional<Tensor> key_positions, int64_t, double scale, int64_t left, int64_t right,
    int64_t key_scores, bool per_head, bool exclude_diagonal) {
  Problem p(query, key, value, cu_seqlens, cu_seqlens_k, positions, key_positions, scale, left,
            right, exclude_diagonal);
  Attention& call = p.call;
  const ScalarType wide = wide_of(p.dtype);
  STD_TORCH_CHECK(grad_out.sizes() == query.sizes() &&
                      grad_out.scalar_type() == query.scalar_type(),
                  "ragged_attention: grad_out must have query's shape and dtype");
  const HeadRows upstream(grad_out);
  call.grad_out = upstream.heads();
  if (grad_scores) {
    const bool fits = grad_scores->dim() == (per_head ? 2 : 1) &&
                      grad_scores->size(0) == key.size(0) &&
                      (!per_head || grad_scores->size(1) == call.heads);
    STD_TORCH_CHECK(fits && grad_scores->scalar_type() == wide,
                    "ragged_attention: grad_scores must be the scores' shape and dtype");
    call.grad_scores = {grad_scores->const_data_ptr(), grad_scores->stride(0),
                        per_head ? grad_scores->stride(1) : 0};
    call.mean = key_scores == 2;
    call.score_heads = per_head ? 1 : call.heads;
  }
  Tensor dq = torch::stable::new_empty(query, {query.size(0), call.heads, call.dim});
  Tensor dk = torch::stable::new_empty(key, {key.size(0), p.key_heads, call.dim});
  Tensor dv = torch::stable::new_empty(key, {key.size(0), p.key_heads, call.dim});
  call.grad_query = dq.mutable_data_ptr();
  call.grad_key = dk.mutable_data_ptr();
  call.grad_value = dv.mutable_data_ptr();

  std::vector<AttentionTask> parts;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequence(b);
    parts.push_back({s, 0, 0, s.rows, 0, s.keys, 0});
  }
  const AttentionKernels& kernels = cpu_kernels().attention[p.dtype];
  run_longest_first(call, parts, 2.5, [&](const AttentionTask& t, const AttentionTask*) {
    kernels.grad(call, t, thread_scratch(kernels.grad_scratch(call, t)));
  });
  return {dq, dk, dv};
}

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// ngram_embedding_bag of one instruction set: a few columns at a time, whose sums stay in registers
// while all rows of the list pass.
#include "../isa.h"

#include "../ngram_embedding_bag.h"
#include "vec.h"

namespace lean_kernels {
namespace {

constexpr int kLine = 64;  // bytes
constexpr int kAhead = 8;  // rows
constexpr int kColumns = kVectorBytes == 64 ? 16 : 8;  // vectors

// A row in the output's dtype: that of the rows, float32 for int8.
template <class S>
struct OutputOf {
  using type = S;
};
template <>
struct OutputOf<int8_t> {
  using type = float;
};

LK_INLINE float widen(int8_t v) { return float(v); }

template <class S>
LK_INLINE Vec<typename Accumulator<S>::type> load_row(const S* p) {
  if constexpr (__is_same(S, int8_t)) {
    return load_bytes<float>(p);
  } else {
    return load_wide(p);
  }
}

// Columns of the sums: `count` vectors from `first` on, but for the last, which is at `last`. The
// sums stay in registers, and each row's part of the columns is fetched kAhead rows ahead.
template <int count, class S, class A>
LK_INLINE void sum_columns(const NgramRows& p, int64_t begin, int64_t end, int64_t first,
                           int64_t last, A* sums) {
  constexpr int W = kLanes<A>, kStep = kLine / int(sizeof(S));
  const S* source = static_cast<const S*>(p.source);
  const A* weights = static_cast<const A*>(p.weights);
  Vec<A> sum[count] = {};
  for (int64_t i = begin; i < end; ++i) {
    const S* later = source + p.index[i + kAhead < end ? i + kAhead : end - 1] * p.ld;
#pragma GCC unroll 16
    for (int d = 0; d < count * W; d += kStep) __builtin_prefetch(later + first + d);
    const int64_t index = p.index[i];
    if (index == p.skip) continue;
    A weight = weights ? weights[i] : A(1);
    if (p.scales) weight *= A(p.scales[index]);
    const Vec<A> factor = splat(weight);
    const S* row = source + index * p.ld;
#pragma GCC unroll 16
    for (int k = 0; k < count - 1; ++k) sum[k] += factor * load_row(row + first + k * W);
    sum[count - 1] += factor * load_row(row + last);
  }
#pragma GCC unroll 16
  for (int k = 0; k < count - 1; ++k) store(sums + first + k * W, sum[k]);
  store(sums + last, sum[count - 1]);
}

template <class S, class A, int... less>
LK_INLINE void sum_some_columns(int count, const NgramRows& p, int64_t begin, int64_t end,
                                int64_t first, int64_t last, A* sums,
                                std::integer_sequence<int, less...>) {
  (void)((count == less + 1 &&
          (sum_columns<less + 1, S>(p, begin, end, first, last, sums), true)) || ...);
}

template <class S>
void sum_rows(const NgramRows& p, int64_t begin, int64_t end, void* sums_) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  A* sums = static_cast<A*>(sums_);
  if (begin == end || p.features < W) {  // fewer columns than lanes
    for (int64_t d = 0; d < p.features; ++d) sums[d] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = p.index[i];
      if (index == p.skip) continue;
      A weight = p.weights ? static_cast<const A*>(p.weights)[i] : A(1);
      if (p.scales) weight *= A(p.scales[index]);
      const S* row = static_cast<const S*>(p.source) + index * p.ld;
      for (int64_t d = 0; d < p.features; ++d) sums[d] += weight * A(widen(row[d]));
    }
    return;
  }
  // The last vector may overlap the one before it: a lane summed twice is summed alike.
  const int64_t vectors = (p.features + W - 1) / W, passes = (vectors + kColumns - 1) / kColumns;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t from = vectors * pass / passes, to = vectors * (pass + 1) / passes;
    const int64_t last = to == vectors ? p.features - W : (to - 1) * W;
    sum_some_columns<S>(int(to - from), p, begin, end, from * W, last, sums,
                        std::make_integer_sequence<int, kColumns>());
  }
}

template <class S>
void write_row(const void* sums_, double factor_, int64_t features, void* out_) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const A* sums = static_cast<const A*>(sums_);
  auto* out = static_cast<typename OutputOf<S>::type*>(out_);
  const A factor = A(factor_);
  const Vec<A> factors = splat(factor);
  int64_t d = 0;
  for (; d + W <= features; d += W) store_narrow(out + d, load(sums + d) * factors);
  for (; d < features; ++d) narrow(sums[d] * factor, out + d);
}

template <class S>
void dot_rows(const NgramRows& p, int64_t begin, int64_t end, const void* other_, double factor,
              void* out_) {
  using A = typename Accumulator<S>::type;
  using T = typename OutputOf<S>::type;
  constexpr int W = kLanes<A>;
  const T* other = static_cast<const T*>(other_);
  A* out = static_cast<A*>(out_);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.index[i], next = p.index[i + 1 < end ? i + 1 : i];
    if (row == p.skip) {
      out[i] = 0;
      continue;
    }
    const S* values = static_cast<const S*>(p.source) + row * p.ld;
    const S* after = static_cast<const S*>(p.source) + next * p.ld;
    Vec<A> part[4] = {};
    int64_t d = 0;
    for (; d + 4 * W <= p.features; d += 4 * W) {
      for (int k = 0; k < 4 * W; k += kLine / int(sizeof(S))) __builtin_prefetch(after + d + k);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        part[k] += load_row(values + d + k * W) * load_wide(other + d + k * W);
    }
    for (; d + W <= p.features; d += W) part[0] += load_row(values + d) * load_wide(other + d);
    A lanes[W], sum = 0;
    store(lanes, (part[0] + part[1]) + (part[2] + part[3]));
    for (int k = 0; k < W; ++k) sum += lanes[k];
    for (; d < p.features; ++d) sum += A(widen(values[d])) * A(widen(other[d]));
    out[i] = sum * A(factor) * (p.scales ? A(p.scales[row]) : A(1));
  }
}

template <class S>
constexpr NgramBagKernels kKernels{sum_rows<S>, write_row<S>, dot_rows<S>};

}  // namespace

const NgramBagKernels LEAN_KERNELS_ISA::ngram_bag[kDtypes + 1] = {
    kKernels<float>, kKernels<BFloat16>, kKernels<Float16>, kKernels<double>, kKernels<int8_t>};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// select_tokens of one instruction set. Scores become integers of the same order; the last kept one
// is found by bisection of the integers, a branch-free count of one pass each: linear time for any
// input, where quickselect mispredicts half its branches.
#include "../isa.h"

#include <limits>
#include <type_traits>

#include "../token_selection.h"
#include "vec.h"

namespace lean_kernels {
namespace {

template <class S>
using OrderKey = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;

// Rises with the score; 0 and -0 are equal, NaN is lowest of all and shared with no number.
template <class S>
LK_INLINE Vec<OrderKey<S>> order_keys(Vec<S> v) {
  using K = OrderKey<S>;
  constexpr K kMost = std::numeric_limits<K>::max();
  const Vec<K> nan = (Vec<K>)(v != v);
  const Vec<K> bits = (Vec<K>)(v + S(0));  // -0 + 0 = 0
  const Vec<K> keys = bits ^ ((bits >> (8 * sizeof(K) - 1)) & kMost);
  return (keys & ~nan) | (std::numeric_limits<K>::min() & nan);
}

template <class S>
size_t selection_scratch(int64_t length) {
  return (length + kLanes<S>) * sizeof(OrderKey<S>);
}

template <class K>
LK_INLINE int64_t count_greater(const K* keys, int64_t vectors, K than) {
  constexpr int W = kLanes<K>;
  const Vec<K> bound = splat(than);
  Vec<K> part[4] = {};
  int64_t i = 0;
  for (; i + 4 <= vectors; i += 4)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) part[k] += (Vec<K>)(load(keys + (i + k) * W) > bound);
  for (; i < vectors; ++i) part[0] += (Vec<K>)(load(keys + i * W) > bound);
  const Vec<K> sum = (part[0] + part[1]) + (part[2] + part[3]);
  int64_t count = 0;
  for (int k = 0; k < W; ++k) count -= sum[k];
  return count;
}

template <class S>
void select_best(const TokenScores& p, int64_t begin, int64_t end, int64_t count, int64_t* out,
                 void* scratch) {
  using K = OrderKey<S>;
  constexpr int W = kLanes<K>;
  constexpr K kLeast = std::numeric_limits<K>::min(), kMost = std::numeric_limits<K>::max();
  const int64_t length = end - begin, vectors = (length + W - 1) / W;
  if (count == length) {
    for (int64_t i = 0; i < length; ++i) out[i] = begin + i;
    return;
  }
  const S* scores = static_cast<const S*>(p.scores) + begin;
  K* keys = static_cast<K*>(scratch);
  int64_t i = 0;
  for (; i + W <= length; i += W) store(keys + i, order_keys<S>(load(scores + i)));
  if (i < length) {
    S rest[W];
    for (int k = 0; k < W; ++k) rest[k] = i + k < length ? scores[i + k] : S(NAN);
    store(keys + i, order_keys<S>(load(rest)));
  }
  if (!p.protect) {
    keys[0] = kMost;
  } else {
    for (i = 0; i < length; ++i) keys[i] = p.protect[begin + i] ? kMost : keys[i];
  }

  // low: the largest key known to be reached by `count` tokens. ties: how many equal to it to keep.
  K low = kLeast, high = kMost;
  int64_t ties = -1;
  while (low < high) {
    using U = std::make_unsigned_t<K>;
    const K middle = K(U(low) + (U(high) - U(low)) / 2 + (U(high) - U(low)) % 2);
    const int64_t reached = count_greater(keys, vectors, K(middle - 1));
    if (reached >= count) {
      low = middle;
      if (reached == count) {
        ties = count;
        break;
      }
    } else {
      high = middle - 1;
    }
  }
  if (ties < 0) ties = count - count_greater(keys, vectors, low);
  int64_t kept = 0;
  for (i = 0; kept < count; ++i) {
    const bool tied = keys[i] == low;
    out[kept] = begin + i;
    kept += (keys[i] > low) | (tied & (ties > 0));
    ties -= tied;
  }
}

template <class S>
LK_INLINE bool kept_above(const TokenScores& p, int64_t begin, int64_t i, S threshold) {
  return (p.protect ? p.protect[i] != 0 : i == begin) |
         (static_cast<const S*>(p.scores)[i] >= threshold);
}

template <class S>
int64_t count_above(const TokenScores& p, int64_t begin, int64_t end, double threshold) {
  int64_t kept = 0;
  for (int64_t i = begin; i < end; ++i) kept += kept_above(p, begin, i, S(threshold));
  return kept;
}

template <class S>
void select_above(const TokenScores& p, int64_t begin, int64_t end, double threshold,
                  int64_t* out) {
  for (int64_t i = begin; i < end; ++i)
    if (kept_above(p, begin, i, S(threshold))) *out++ = i;
}

template <class S>
constexpr SelectionKernels selection_kernels() {
  return {selection_scratch<S>, select_best<S>, count_above<S>, select_above<S>};
}

}  // namespace

const SelectionKernels LEAN_KERNELS_ISA::selection[2] = {selection_kernels<float>(),
                                                          selection_kernels<double>()};

}  // namespace lean_kernels

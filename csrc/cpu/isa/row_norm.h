// SPDX-License-Identifier: Apache-2.0
// Loops over one row of features, and its normalisation. `kind` in them is a value of the type to
// compute in: a vector, or for features past the last whole vector one number.
#pragma once

#include <type_traits>

#include "vec.h"

namespace lean_kernels {
namespace {

// Elements at p, widened.
template <class V, class S>
LK_INLINE V read(V, const S* p) {
  if constexpr (std::is_arithmetic_v<V>) {
    return widen(*p);
  } else {
    return load_wide(p);
  }
}

// Stores what was computed in A, and returns it.
template <class V, class A>
LK_INLINE V keep(A* p, V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    *p = v;
  } else {
    store(p, v);
  }
  return v;
}

template <class V, int count>
struct Terms {
  V of[count];
};

// Sums over the features i of each of terms(i, kind), always in the same order.
template <class A, int count, class F>
LK_INLINE Terms<A, count> sums_over(int64_t features, F terms) {
  constexpr int W = kLanes<A>;
  Vec<A> part[count][4] = {};
  const auto add = [&](int k, const Terms<Vec<A>, count>& t) {
#pragma GCC unroll 2
    for (int n = 0; n < count; ++n) part[n][k] += t.of[n];
  };
  int64_t i = 0;
  for (; i + 4 * W <= features; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(k, terms(i + k * W, Vec<A>{}));
  for (; i + W <= features; i += W) add(0, terms(i, Vec<A>{}));
  Terms<A, count> sums;
#pragma GCC unroll 2
  for (int n = 0; n < count; ++n)
    sums.of[n] = sum_of_lanes<A>((part[n][0] + part[n][1]) + (part[n][2] + part[n][3]));
  for (; i < features; ++i) {
    const Terms<A, count> t = terms(i, A{});
#pragma GCC unroll 2
    for (int n = 0; n < count; ++n) sums.of[n] += t.of[n];
  }
  return sums;
}

template <class A, class Term>
LK_INLINE A sum_over(int64_t features, Term term) {
  const auto terms = [&](int64_t i, auto kind) {
    return Terms<decltype(kind), 1>{{term(i, kind)}};
  };
  return sums_over<A, 1>(features, terms).of[0];
}

template <class A>
LK_INLINE A squared_distance(const A* row, A center, int64_t features) {
  return sum_over<A>(features, [&](int64_t i, auto kind) {
    const auto v = read(kind, row + i) - center;
    return v * v;
  });
}

// The variance of a row whose sum of squares is known.
template <class A>
LK_INLINE A variance_of(const A* row, A mean, A squares, int64_t features) {
  const A variance = squares / A(features) - mean * mean;
  if (mean * mean <= variance) return variance;
  // Far from zero that is a small difference of large numbers.
  return squared_distance(row, mean, features) / A(features);
}

// Narrows and stores one value, or a vector of them.
template <class V, class S>
LK_INLINE void write(S* p, V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    narrow(v, p);
  } else {
    store_narrow(p, v);
  }
}

// visit(i, kind) for every feature.
template <class A, class Visit>
LK_INLINE void each_feature(int64_t features, Visit visit) {
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= features; i += W) visit(i, Vec<A>{});
  for (; i < features; ++i) visit(i, A{});
}

struct FetchNothing {
  void operator()(int64_t) const {}
};

// y[i] = value(i, kind). `streamed`: past the caches; y and its length are then whole cache lines.
// `fetch(i)` is called before each vector.
template <bool streamed, class S, class Value, class Fetch = FetchNothing>
LK_INLINE void write_row(S* y, int64_t features, Value value, Fetch fetch = {}) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= features; i += W) {
    fetch(i);
    if constexpr (streamed) {
      stream_narrow(y + i, value(i, Vec<A>{}));
    } else {
      store_narrow(y + i, value(i, Vec<A>{}));
    }
  }
  for (; i < features; ++i) narrow(value(i, A{}), y + i);
}

// y = (row - center) * scale * weight + bias; weight and bias may be null.
template <bool streamed, class S, class A, class Fetch = FetchNothing>
LK_INLINE void write_normal(S* y, const A* row, A center, A scale, const A* weight, const A* bias,
                            int64_t features, Fetch fetch = {}) {
  const auto normal = [&](int64_t i, auto kind) { return (read(kind, row + i) - center) * scale; };
  if (weight && bias) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) * read(kind, weight + i) + read(kind, bias + i);
    }, fetch);
  } else if (weight) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) * read(kind, weight + i);
    }, fetch);
  } else if (bias) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) + read(kind, bias + i);
    }, fetch);
  } else {
    write_row<streamed>(y, features, normal, fetch);
  }
}

}  // namespace
}  // namespace lean_kernels

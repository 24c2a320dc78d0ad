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

// Lane 0 of v after it is added to itself by halves.
template <int step, class A, int... lane>
LK_INLINE A fold_lanes(Vec<A> v, std::integer_sequence<int, lane...> lanes) {
  constexpr int W = sizeof...(lane);
  v += __builtin_shufflevector(v, v, ((lane + step) % W)...);
  if constexpr (step > 1) {
    return fold_lanes<step / 2, A>(v, lanes);
  } else {
    return v[0];
  }
}

template <class A>
LK_INLINE A sum_lanes(const Vec<A> (&part)[4]) {
  constexpr int W = kLanes<A>;
  return fold_lanes<W / 2, A>((part[0] + part[1]) + (part[2] + part[3]),
                              std::make_integer_sequence<int, W>());
}

struct FetchNothing {
  void operator()(int64_t) const {}
};

// Sum over the features i of term(i, kind), always in the same order. `fetch(i)` is called before
// each four vectors.
template <class A, class Term, class Fetch = FetchNothing>
LK_INLINE A sum_over(int64_t features, Term term, Fetch fetch = {}) {
  constexpr int W = kLanes<A>;
  Vec<A> part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= features; i += 4 * W) {
    fetch(i);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) part[k] += term(i + k * W, Vec<A>{});
  }
  for (; i + W <= features; i += W) part[0] += term(i, Vec<A>{});
  A sum = sum_lanes<A>(part);
  for (; i < features; ++i) sum += term(i, A{});
  return sum;
}

template <class A, class Fetch = FetchNothing>
LK_INLINE A squared_distance(const A* row, A center, int64_t features, Fetch fetch = {}) {
  return sum_over<A>(
      features,
      [&](int64_t i, auto kind) {
        const auto v = read(kind, row + i) - center;
        return v * v;
      },
      fetch);
}

// y[i] = value(i, kind). `streamed`: past the caches; y and its length are then whole cache lines.
template <bool streamed, class S, class Value>
LK_INLINE void write_row(S* y, int64_t features, Value value) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= features; i += W) {
    if constexpr (streamed) {
      stream_narrow(y + i, value(i, Vec<A>{}));
    } else {
      store_narrow(y + i, value(i, Vec<A>{}));
    }
  }
  for (; i < features; ++i) narrow(value(i, A{}), y + i);
}

// y = (row - center) * scale * weight + bias; weight and bias may be null.
template <bool streamed, class S, class A>
LK_INLINE void write_normal(S* y, const A* row, A center, A scale, const A* weight, const A* bias,
                            int64_t features) {
  const auto normal = [&](int64_t i, auto kind) { return (read(kind, row + i) - center) * scale; };
  if (weight && bias) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) * read(kind, weight + i) + read(kind, bias + i);
    });
  } else if (weight) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) * read(kind, weight + i);
    });
  } else if (bias) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) {
      return normal(i, kind) + read(kind, bias + i);
    });
  } else {
    write_row<streamed>(y, features, normal);
  }
}

}  // namespace
}  // namespace lean_kernels

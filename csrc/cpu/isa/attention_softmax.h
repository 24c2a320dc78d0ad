// SPDX-License-Identifier: Apache-2.0
// What ragged_attention's softmax is made of: powers of two, logarithms, parts of rows.
#pragma once

#include "activations.h"
#include "tiles.h"

namespace lean_kernels {
namespace {

LK_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
template <class T>
LK_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
// For this one GCC makes a comparison and a blend of the above.
LK_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
#endif

// x <- 2^x for x <= 0, relative error 1.6e-7; 0 below -126.5. NaN passes through. Step by step for
// all vectors, since a processor's schedulers do not look far enough ahead to mix whole chains.
template <int count>
LK_INLINE void exp2_each(Vec<float> (&x)[count]) {
  // Adding `round` leaves the nearest integer, plus the bias of an exponent, in the mantissa's low
  // bits; shifted into the exponent's place, -127 makes a zero.
  const Vec<float> round = splat(0x1.8p23f + 127), least = splat(-127.0f);
  Vec<float> shifted[count], r[count], p[count];
  const auto each = [](auto f) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) f(i);
  };
  each([&](int i) { x[i] = max_of(least, x[i]); });
  each([&](int i) { shifted[i] = x[i] + round; });
  each([&](int i) { r[i] = shifted[i] - round; });
  each([&](int i) { r[i] = x[i] - r[i]; });
  each([&](int i) { p[i] = r[i] * splat(1.326472726e-03f) + splat(9.671512700e-03f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(5.550733744e-02f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(2.402224208e-01f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(6.931469776e-01f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(1.0f); });
  each([&](int i) { x[i] = p[i] * (Vec<float>)((IntVec)shifted[i] << 23); });
}
template <int count>
LK_INLINE void exp2_each(Vec<double> (&x)[count]) {
  for (Vec<double>& v : x) {
    double lanes[kLanes<double>];
    store(lanes, v);
    for (double& lane : lanes) lane = ::exp2(lane);
    v = load(lanes);
  }
}

// ln x for x >= 1, absolute error 5e-8 + half a unit; 0 gives -inf, NaN stays.
LK_INLINE Vec<float> log_of(Vec<float> x) {
  const IntVec bits = (IntVec)x, shift = (bits - 0x3f3504f3) >> 23;  // x = m 2^shift, m near 1
  const Vec<float> f = (Vec<float>)(bits - (shift << 23)) - splat(1.0f);
  Vec<float> p = f * splat(8.700439029e-02f) + splat(-1.426748956e-01f);
  p = p * f + splat(1.491476801e-01f);
  p = p * f + splat(-1.657758440e-01f);
  p = p * f + splat(1.996306377e-01f);
  p = p * f + splat(-2.500133704e-01f);
  p = p * f + splat(3.333391074e-01f);
  p = p * f + splat(-0.5f);
  const Vec<float> exponent = __builtin_convertvector(shift, Vec<float>);
  const Vec<float> y = exponent * splat(0.693147181f) + (p * (f * f) + f);
  return x > splat(0.0f) ? y : (x == splat(0.0f) ? splat(-__builtin_inff()) : x);
}
LK_INLINE Vec<double> log_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

template <class A>
LK_INLINE Vec<A> lane_numbers() {
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = A(i);
  return v;
}

// Which of the columns [at, at + W) lie in the span: all bits set.
template <class A>
LK_INLINE auto lanes_inside(int64_t at, Span span) {
  constexpr int64_t W = kLanes<A>;
  const A begin = A(max_of<int64_t>(span.begin - at, 0));
  const A end = A(max_of<int64_t>(min_of(span.end - at, W), 0));
  return (lane_numbers<A>() >= splat(begin)) & (lane_numbers<A>() < splat(end));
}

// Outside of `seen`, the columns of `span` (whole vectors) get `value`.
template <class A>
LK_INLINE void fill_outside(A* s, Span span, Span seen, A value) {
  constexpr int W = kLanes<A>;
  const auto fix = [&](int64_t j) {
    store(s + j, lanes_inside<A>(j, seen) ? load(s + j) : splat(value));
  };
  int64_t j = span.begin;
  for (; j < span.end && j < seen.begin; j += W) fix(j);
  j = max_of(j, seen.end / W * W);
  for (; j < span.end; j += W) fix(j);
}

// Adds 2^(multiplier s - shift) of count vectors of s from column j on to sum, and keeps them.
template <int count, class A, class Keep>
LK_INLINE void exponentiate(const A* s, int64_t j, Vec<A> multiplier, Vec<A> shift, Vec<A>& sum,
                            Keep keep) {
  Vec<A> v[count] = {};
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) v[i] = load(s + j + i * kLanes<A>) * multiplier - shift;
  exp2_each(v);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) keep(j + i * kLanes<A>, v[i]);
#pragma GCC unroll 4
  for (int i = 1; i < count; ++i) v[0] += v[i];
  sum += v[0];
}

}  // namespace
}  // namespace lean_kernels

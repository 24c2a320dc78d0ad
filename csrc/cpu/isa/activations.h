// SPDX-License-Identifier: Apache-2.0
// Activations on a few vectors at once: each polynomial is one long dependent chain, and several
// side by side fill the multiply-add units. float32 uses minimax polynomials fitted for this file
// (errors given beside each); float64, the checking precision, calls libm lane by lane.
#pragma once

#include "vec.h"

namespace lean_kernels {
namespace {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kElu };

constexpr int kMany = 4;

template <class A>
struct Many {
  Vec<A> v[kMany];
};

template <class A, class F>
LK_INLINE Many<A> map(F f) {
  Many<A> out;
#pragma GCC unroll 4
  for (int i = 0; i < kMany; ++i) out.v[i] = f(i);
  return out;
}

using Floats = Many<float>;
LK_INLINE Floats operator*(Floats a, Floats b) {
  return map<float>([&](int i) { return a.v[i] * b.v[i]; });
}
LK_INLINE Floats operator+(Floats a, Floats b) {
  return map<float>([&](int i) { return a.v[i] + b.v[i]; });
}
LK_INLINE Floats operator/(Floats a, Floats b) {
  return map<float>([&](int i) { return a.v[i] / b.v[i]; });
}
LK_INLINE Floats operator*(Floats a, float b) {
  return map<float>([&](int i) { return a.v[i] * b; });
}
LK_INLINE Floats operator+(Floats a, float b) {
  return map<float>([&](int i) { return a.v[i] + b; });
}
// a where x > limit, else b; and the same below. A NaN in x takes b.
LK_INLINE Floats where_above(Floats x, float limit, float a, Floats b) {
  return map<float>([&](int i) { return x.v[i] > limit ? splat(a) : b.v[i]; });
}
LK_INLINE Floats where_below(Floats x, float limit, float a, Floats b) {
  return map<float>([&](int i) { return x.v[i] < limit ? splat(a) : b.v[i]; });
}

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// exp(x) = scale (1 + rest), |x| at most 89: rest is exp(r) - 1 with |r| <= log(2) / 2.
struct Exponential {
  Floats scale, rest;
};
LK_INLINE Exponential split_exp(Floats x) {
  x = where_below(x, -87.0f, -87.0f, x);
  x = where_above(x, 89.0f, 89.0f, x);
  const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  const Floats shifted = x * 1.442695041f + round, n = shifted + -round;
  const Floats r = x + n * -0.693145752f + n * -1.428606765e-6f;
  Floats p = r * 1.381461637e-03f + 8.368709980e-03f;
  p = p * r + 4.166838733e-02f;
  p = p * r + 1.666652069e-01f;
  p = p * r + 4.999999345e-01f;
  const Floats scale = map<float>([&](int i) {
    return (Vec<float>)(((IntVec)shifted.v[i] + 127) << 23);
  });
  return {scale, p * (r * r) + r};
}

// Relative error 1e-7 between the clamps, infinite above 88.4; NaN passes through.
LK_INLINE Floats exp(Floats x) {
  const Exponential e = split_exp(x);
  return (e.rest + 1.0f) * e.scale;
}
// The same, exact near 0.
LK_INLINE Floats expm1(Floats x) {
  const Exponential e = split_exp(x);
  return e.rest * e.scale + (e.scale + -1.0f);
}

// erf(x / sqrt 2): absolute error 2.9e-7, odd polynomial of degree 27 up to |x| = 5.2, then 1. Even
// and odd powers of s run side by side.
LK_INLINE Floats erf_of_scaled(Floats x) {
  const Floats s = x * x * 0.07396449704f + -1.0f, t = s * s;
  Floats odd = t * -9.625531622e-04f + -2.442990683e-03f;
  Floats even = t * 2.537022177e-03f + 3.600244994e-03f;
  odd = odd * t + -9.578074153e-03f;
  even = even * t + 1.711993591e-02f;
  odd = odd * t + -2.501024409e-02f;
  even = even * t + 3.590957358e-02f;
  odd = odd * t + -4.944725861e-02f;
  even = even * t + 6.397991862e-02f;
  odd = odd * t + -7.985963919e-02f;
  even = even * t + 1.000490427e-01f;
  odd = odd * t + -1.354873349e-01f;
  even = even * t + 2.718999861e-01f;
  const Floats p = (odd * s + even) * x;
  return where_above(x, 5.2f, 1.0f, where_below(x, -5.2f, -1.0f, p));
}

template <int kActivation>
LK_INLINE Floats activate(Floats x) {
  if constexpr (kActivation == kRelu) return where_below(x, 0.0f, 0.0f, x);
  if constexpr (kActivation == kGelu) {
    const Floats half = x * 0.5f;
    return half * erf_of_scaled(x) + half;
  }
  if constexpr (kActivation == kGeluTanh) {
    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    return x / (exp(x * (x * x * -0.0713548163f + -1.5957691216f)) + 1.0f);
  }
  if constexpr (kActivation == kSilu) return x / (exp(x * -1.0f) + 1.0f);
  if constexpr (kActivation == kElu) {
    const Floats below = expm1(x);
    return map<float>([&](int i) { return x.v[i] > 0.0f ? x.v[i] : below.v[i]; });
  }
  return x;
}

template <int kActivation>
LK_INLINE double activate_one(double x) {
  if constexpr (kActivation == kRelu) return x < 0 ? 0 : x;
  if constexpr (kActivation == kGelu) return 0.5 * x * (1 + ::erf(x * 0.70710678118654752440));
  if constexpr (kActivation == kGeluTanh)
    return 0.5 * x * (1 + ::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
  if constexpr (kActivation == kSilu) return x / (1 + ::exp(-x));
  if constexpr (kActivation == kElu) return x > 0 ? x : ::expm1(x);
  return x;
}

template <int kActivation>
LK_INLINE Many<double> activate(Many<double> x) {
  if constexpr (kActivation != kIdentity)
    for (int i = 0; i < kMany; ++i)
      for (int lane = 0; lane < kLanes<double>; ++lane)
        x.v[i][lane] = activate_one<kActivation>(x.v[i][lane]);
  return x;
}

// Derivatives, of those that are trained through here.
template <int kActivation>
LK_INLINE Floats slope(Floats x) {
  if constexpr (kActivation == kRelu)
    return map<float>([&](int i) { return x.v[i] > 0.0f ? splat(1.0f) : splat(0.0f); });
  if constexpr (kActivation == kGelu)
    return erf_of_scaled(x) * 0.5f + 0.5f + exp(x * x * -0.5f) * x * 0.3989422804f;
  if constexpr (kActivation == kElu) {
    const Floats below = exp(x);
    return map<float>([&](int i) { return x.v[i] > 0.0f ? splat(1.0f) : below.v[i]; });
  }
}

template <int kActivation>
LK_INLINE Many<double> slope(Many<double> x) {
  for (int i = 0; i < kMany; ++i)
    for (int lane = 0; lane < kLanes<double>; ++lane) {
      const double v = x.v[i][lane];
      if constexpr (kActivation == kRelu) x.v[i][lane] = v > 0 ? 1 : 0;
      if constexpr (kActivation == kGelu)
        x.v[i][lane] = 0.5 * (1 + ::erf(v * 0.70710678118654752440)) +
                       0.39894228040143267794 * v * ::exp(-0.5 * v * v);
      if constexpr (kActivation == kElu) x.v[i][lane] = v > 0 ? 1 : ::exp(v);
    }
  return x;
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Activations on vectors. float32 uses minimax polynomials fitted for this file (absolute errors
// given beside each); float64, the checking precision, calls libm lane by lane.
#pragma once

#include "vec.h"

namespace lean_kernels {
namespace {

enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu };

template <class F>
LK_INLINE Vec<double> each(Vec<double> x, F f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// Relative error 1e-7 between the clamps, infinite above 88.4; NaN passes through.
LK_INLINE Vec<float> exp_v(Vec<float> x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  Vec<float> shifted = x * 1.442695041f + round;
  Vec<float> n = shifted - round;
  Vec<float> r = x - n * 0.693145752f - n * 1.428606765e-6f;
  Vec<float> p = splat(1.381461637e-03f);
  p = p * r + 8.368709980e-03f;
  p = p * r + 4.166838733e-02f;
  p = p * r + 1.666652069e-01f;
  p = p * r + 4.999999345e-01f;
  p = p * (r * r) + r + 1.0f;
  IntVec scale = ((IntVec)shifted + 127) << 23;
  return p * (Vec<float>)scale;
}

// erf(x / sqrt 2): absolute error 2.9e-7, odd polynomial of degree 27 up to |x| = 5.2, then 1.
LK_INLINE Vec<float> erf_of_scaled(Vec<float> x) {
  Vec<float> s = x * x * 0.07396449704f - 1.0f;
  Vec<float> p = splat(-9.625531622e-04f);
  p = p * s + 2.537022177e-03f;
  p = p * s - 2.442990683e-03f;
  p = p * s + 3.600244994e-03f;
  p = p * s - 9.578074153e-03f;
  p = p * s + 1.711993591e-02f;
  p = p * s - 2.501024409e-02f;
  p = p * s + 3.590957358e-02f;
  p = p * s - 4.944725861e-02f;
  p = p * s + 6.397991862e-02f;
  p = p * s - 7.985963919e-02f;
  p = p * s + 1.000490427e-01f;
  p = p * s - 1.354873349e-01f;
  p = p * s + 2.718999861e-01f;
  p = p * x;
  p = x > 5.2f ? splat(1.0f) : p;
  return x < -5.2f ? splat(-1.0f) : p;
}

template <int kActivation>
LK_INLINE Vec<float> activate(Vec<float> x) {
  if constexpr (kActivation == kRelu) return x < 0.0f ? splat(0.0f) : x;
  if constexpr (kActivation == kGelu) {
    Vec<float> half = x * 0.5f;
    return half * erf_of_scaled(x) + half;
  }
  if constexpr (kActivation == kGeluTanh) {
    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    Vec<float> minus_2u = x * (x * x * -0.0713548163f - 1.5957691216f);
    return x / (exp_v(minus_2u) + 1.0f);
  }
  if constexpr (kActivation == kSilu) return x / (exp_v(-x) + 1.0f);
  return x;
}

template <int kActivation>
LK_INLINE Vec<double> activate(Vec<double> x) {
  if constexpr (kActivation == kRelu) return x < 0.0 ? splat(0.0) : x;
  if constexpr (kActivation == kGelu)
    return each(x, [](double v) { return 0.5 * v * (1 + erf(v * 0.70710678118654752440)); });
  if constexpr (kActivation == kGeluTanh)
    return each(x, [](double v) {
      return 0.5 * v * (1 + tanh(0.79788456080286535588 * (v + 0.044715 * v * v * v)));
    });
  if constexpr (kActivation == kSilu) return each(x, [](double v) { return v / (1 + exp(-v)); });
  return x;
}

}  // namespace
}  // namespace lean_kernels

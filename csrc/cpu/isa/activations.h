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
LK_INLINE Floats operator-(Floats a, Floats b) {
  return map<float>([&](int i) { return a.v[i] - b.v[i]; });
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

LK_INLINE Floats magnitude(Floats x) {
  return map<float>([&](int i) { return (Vec<float>)((IntVec)x.v[i] & 0x7fffffff); });
}

#if defined(__AVX512F__)
// Of erf_of_scaled: the coefficient of each power of u, for the cells about 0, 1, ... 15.
alignas(64) constexpr float kErfCells[5][16] = {
    {6.68242972e-09f, 0.277118146f, 0.521811962f, 0.712594151f, 0.843937576f, 0.923779547f,
     0.966634691f, 0.986945152f, 0.995444298f, 0.998584569f, 0.999608994f, 0.999904096f,
     0.999979138f, 0.999995947f, 0.999999285f, 1.0f},
    {0.282937109f, 0.265694499f, 0.220022559f, 0.160672247f, 0.103467159f, 0.0587558001f,
     0.0294227712f, 0.0129926791f, 0.00505933352f, 0.00173725735f, 0.000526026357f,
     0.000140449163f, 3.30669718e-05f, 6.86480189e-06f, 1.2566494e-06f, 0.0f},
    {1.07424776e-05f, -0.0167048909f, -0.0276668612f, -0.0303058401f, -0.0260213446f,
     -0.0184710752f, -0.0110997176f, -0.00571848871f, -0.00254493975f, -0.00098313496f,
     -0.000330772542f, -9.7152275e-05f, -2.49540117e-05f, -5.61260913e-06f, -1.1065481e-06f, 0.0f},
    {-0.00599016529f, -0.00484359171f, -0.00228972547f, 0.000427092076f, 0.00217307545f,
     0.00262528495f, 0.00217037648f, 0.00140764297f, 0.000751391577f, 0.000337743782f,
     0.000129493463f, 4.26912702e-05f, 1.21675339e-05f, 3.00949091e-06f, 6.47779984e-07f, 0.0f},
    {0.000138581716f, 0.000498761656f, 0.000718645635f, 0.000590437674f, 0.000269938377f,
     -2.55014565e-05f, -0.00017552136f, -0.000188505786f, -0.000134580885f, -7.4347874e-05f,
     -3.34921024e-05f, -1.26151836e-05f, -4.02993692e-06f, -1.10166945e-06f, -2.59294495e-07f,
     0.0f}};

// erf(a / sqrt 2), a at least 0: absolute error 2.8e-7. A polynomial of degree 4 in the distance u
// from the middle of one of 15 cells, whose coefficients a permutation looks up; then 1.
LK_INLINE Floats erf_of_scaled(Floats a) {
  const float cells = 2.82f, round = 0x1.8p23f;
  a = where_above(a, 15 / cells, 15 / cells, a);
  const Floats shifted = a * cells + round, u = a * cells - (shifted + -round);
  const auto power = [&](int k) {
    return map<float>([&](int i) {
      const __m512 table = _mm512_load_ps(kErfCells[k]);
      return (Vec<float>)_mm512_permutexvar_ps((__m512i)shifted.v[i], table);
    });
  };
  return (((power(4) * u + power(3)) * u + power(2)) * u + power(1)) * u + power(0);
}
#else
// erf(a / sqrt 2), a at least 0: absolute error 2.9e-7, odd polynomial of degree 27 up to 5.2, then
// 1. Even and odd powers of s run side by side.
LK_INLINE Floats erf_of_scaled(Floats a) {
  const Floats s = a * a * 0.07396449704f + -1.0f, t = s * s;
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
  return where_above(a, 5.2f, 1.0f, (odd * s + even) * a);
}
#endif

template <int kActivation>
LK_INLINE Floats activate(Floats x) {
  if constexpr (kActivation == kRelu) return where_below(x, 0.0f, 0.0f, x);
  if constexpr (kActivation == kGelu) {
    const Floats half = x * 0.5f;
    return magnitude(half) * erf_of_scaled(magnitude(x)) + half;
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
  if constexpr (kActivation == kGelu) {
    const Floats erf = erf_of_scaled(magnitude(x));
    const Floats signed_erf =
        map<float>([&](int i) { return x.v[i] < 0.0f ? -erf.v[i] : erf.v[i]; });
    return signed_erf * 0.5f + 0.5f + exp(x * x * -0.5f) * x * 0.3989422804f;
  }
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

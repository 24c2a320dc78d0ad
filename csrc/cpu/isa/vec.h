// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set a file is compiled for. Names are local to the including file, so
// that no set's code is ever linked into another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 headers, GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace lean_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

#define LK_INLINE inline __attribute__((always_inline))

template <class T>
LK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
LK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
LK_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// Storage types: how a tensor's elements become the accumulator type and back.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

LK_INLINE float widen(float v) { return v; }
LK_INLINE double widen(double v) { return v; }
LK_INLINE float widen(BFloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
LK_INLINE float widen(Float16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest + 0x1c000) << 13);
  } else {  // subnormal: exact in float32
    float f = float(rest) * 0x1p-24f;
    return sign ? -f : f;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

LK_INLINE void narrow(float v, float* p) { *p = v; }
LK_INLINE void narrow(double v, double* p) { *p = v; }
LK_INLINE void narrow(float v, BFloat16* p) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}
LK_INLINE void narrow(float v, Float16* p) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    p->bits = uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  } else if (rest >= 0x477ff000) {  // rounds past the largest finite value
    p->bits = uint16_t(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // subnormal: let float32 addition round at 2^-24
    float f;
    memcpy(&f, &rest, 4);
    f += 0.5f;
    memcpy(&bits, &f, 4);
    p->bits = uint16_t(sign | (bits - 0x3f000000));
  } else {
    p->bits = uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
  }
#endif
}

// Loads one vector of accumulators from storage, and stores it back.
template <class S>
LK_INLINE Vec<typename Accumulator<S>::type> load_wide(const S* p) {
  using A = typename Accumulator<S>::type;
  if constexpr (sizeof(S) == sizeof(A)) {
    return load(reinterpret_cast<const A*>(p));
  } else {
#if defined(__AVX512F__)
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(S, Float16)) return (Vec<A>)_mm512_cvtph_ps(raw);
    return (Vec<A>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(S, Float16)) return (Vec<A>)_mm256_cvtph_ps(raw);
    return (Vec<A>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}
// One vector of accumulators from int8.
template <class A>
LK_INLINE Vec<A> load_bytes(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes<A>)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#endif
  return __builtin_convertvector(bytes, Vec<A>);
}
template <class S>
LK_INLINE void store_narrow(S* p, Vec<typename Accumulator<S>::type> v) {
  using A = typename Accumulator<S>::type;
  if constexpr (sizeof(S) == sizeof(A)) {
    store(reinterpret_cast<A*>(p), v);
  } else if constexpr (__is_same(S, BFloat16)) {  // as narrow() does
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Bits kept = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded;
    const Halves halves = __builtin_convertvector(kept, Halves);
    memcpy(p, &halves, sizeof(halves));
#if defined(__AVX512F__)
  } else if constexpr (__is_same(S, Float16)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  } else if constexpr (__is_same(S, Float16)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    A lanes[kLanes<A>];
    store(lanes, v);
    for (int i = 0; i < kLanes<A>; ++i) narrow(lanes[i], p + i);
  }
}

// store_narrow past the caches; p is aligned like a vector of S. Other threads see such stores only
// after this one's `end_of_stores`.
template <class S>
LK_INLINE void stream_narrow(S* p, Vec<typename Accumulator<S>::type> v) {
#if defined(__AVX2__)
  constexpr int kBytes = kLanes<typename Accumulator<S>::type> * sizeof(S);
  S lanes[kBytes / sizeof(S)];
  store_narrow(lanes, v);  // stays in a register
#if defined(__AVX512F__)
  if constexpr (kBytes == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(lanes));
#endif
  if constexpr (kBytes == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
#else
  store_narrow(p, v);
#endif
}
LK_INLINE void end_of_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One exchange of a transposition: where `step` is set in a lane's number, a takes from b.
template <int step, class A, int... lane>
LK_INLINE void exchange(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  const Vec<A> low = __builtin_shufflevector(a, b, (lane & step ? W + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? W + lane : lane + step)...);
  a = low;
}

// v[i] lane j <-> v[j] lane i.
template <class A, int step = 1>
LK_INLINE void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int W = kLanes<A>;
  if constexpr (step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & step)) exchange<step, A>(v[i], v[i + step], std::make_integer_sequence<int, W>());
    transpose<A, 2 * step>(v);
  }
}

template <int step, class A, int... lane>
LK_INLINE Vec<A> swap_lanes(Vec<A> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ step)...);
}

// The sum of a vector's lanes, one half added to the other, always by the same tree.
template <class A, int step = kLanes<A> / 2>
LK_INLINE A sum_of_lanes(Vec<A> v) {
  if constexpr (step == 0) {
    return v[0];
  } else {
    v += swap_lanes<step, A>(v, std::make_integer_sequence<int, kLanes<A>>());
    return sum_of_lanes<A, step / 2>(v);
  }
}

// a and b folded into one vector: where `step` is set in a lane's number lies what `op` makes of
// b's pairs of lanes `step` apart, elsewhere that of a's.
template <int step, class A, class Op, int... lane>
LK_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, Op op, std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  return op(__builtin_shufflevector(a, b, ((lane & step ? W : 0) + (lane & ~step))...),
            __builtin_shufflevector(a, b, ((lane & step ? W : 0) + (lane | step))...));
}

// Joins the lanes of W vectors by `op`, always by the same tree: lane i of the result is v[i]'s.
template <class A, int step = 1, class Op>
LK_INLINE Vec<A> reduce_lanes(Vec<A> (&v)[kLanes<A>], Op op) {
  constexpr int W = kLanes<A>;
  if constexpr (step == W) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W / (2 * step); ++i)
      v[i] = fold<step, A>(v[2 * i], v[2 * i + 1], op, std::make_integer_sequence<int, W>());
    return reduce_lanes<A, 2 * step>(v, op);
  }
}

}  // namespace
}  // namespace lean_kernels

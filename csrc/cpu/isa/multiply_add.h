// SPDX-License-Identifier: Apache-2.0
// How register tiles multiply: packed elements of type P hold kInputs inputs each, and panels hold
// kDepth elements of a row after another.
#pragma once

#include "tiles.h"

namespace lean_kernels {
namespace {

template <class A_>
struct MultiplyAdd {
  using A = A_;
  using P = A_;
  static constexpr int kInputs = 1;
  static constexpr bool kTiles = false;
  static constexpr int kPanelRows = kWideRows;
  static constexpr int kDepth = 16;

  static LK_INLINE Vec<A> add(Vec<A> sum, Vec<P> w, P x) { return sum + w * x; }
  // A vector of packed elements, and one of which `left` inputs are there.
  template <class S>
  static LK_INLINE Vec<P> load_packed(const S* p) {
    return load_wide(p);
  }
  template <class S>
  static LK_INLINE P pack_one(const S* p, int64_t) {
    return widen(*p);
  }
  template <class S>
  static LK_INLINE void store_rounded(S* p, Vec<A> v) {
    store_narrow(p, v);
  }
};

#if defined(__AVX512F__)
// The even input lies in an element's low half, the next one in its high half. Instructions are
// written as text, since the rest of the file must run where they are missing.
struct BFloat16Pairs {
  using A = float;
  using P = int32_t;
  static constexpr int kInputs = 2;
  static constexpr bool kTiles = false;
  static constexpr int kPanelRows = kWideRows;
  static constexpr int kDepth = 8;

  // AMD's cores multiply a vector of pairs in the time of one of float32, Intel's without AMX in
  // twice that time.
  static bool fast() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  }
  static LK_INLINE Vec<A> add(Vec<A> sum, Vec<P> w, P x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_epi32(x)));
    return sum;
  }
  static LK_INLINE Vec<P> load_packed(const BFloat16* p) {
    return (Vec<P>)_mm512_loadu_si512(p);
  }
  static LK_INLINE P pack_one(const BFloat16* p, int64_t left) {
    return P(p[0].bits | (left > 1 ? uint32_t(p[1].bits) << 16 : 0));
  }
  static LK_INLINE void store_rounded(BFloat16* p, Vec<A> v) {
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  // Elements of W columns in rows p and p + ld; zeros for the latter where it is not `there`.
  static LK_INLINE Vec<P> load_rows(const BFloat16* p, int64_t ld, bool there) {
    const auto wide = [](const BFloat16* row) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    };
    const __m512i low = wide(p);
    return (Vec<P>)(there ? _mm512_or_si512(low, _mm512_slli_epi32(wide(p + ld), 16)) : low);
  }
};
#endif

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// What the int8 kernels of block_sparse_linear share: rounding of x, and the epilogue.
#pragma once

#include <cmath>

#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

using Ints = Vec<int32_t>;
constexpr int kLanes32 = kLanes<int32_t>;

template <int step = kLanes32 / 2>
LK_INLINE int32_t largest_lane(Ints v) {
  if constexpr (step == 0) {
    return v[0];
  } else {
    const Ints other = swap_lanes<step, int32_t>(v, std::make_integer_sequence<int, kLanes32>());
    return largest_lane<step / 2>(v > other ? v : other);
  }
}

// The largest absolute value of some numbers; infinite or NaN if any of them is. Sizes are ordered
// like their bits, and above all others lies what is not finite.
class Largest {
 public:
  template <class S>
  LK_INLINE void add_vector(const S* x) {
    const Ints size = (Ints)load_wide(x) & kSize;
    most_ = size > most_ ? size : most_;
  }
  template <class S>
  LK_INLINE void add(S x) {
    const float v = widen(x);
    int32_t bits;
    memcpy(&bits, &v, 4);
    rest_ = (bits & kSize) > rest_ ? bits & kSize : rest_;
  }
  LK_INLINE float get() const {
    const int32_t most = largest_lane(most_), bits = most > rest_ ? most : rest_;
    float size;
    memcpy(&size, &bits, 4);
    return size;
  }

 private:
  static constexpr int32_t kSize = 0x7fffffff;
  Ints most_ = {};
  int32_t rest_ = 0;
};

#if defined(__AVX2__)
// 32 numbers as bytes q + kZero. Packing goes on within lanes of 128 bits: their parts lie in order
// only after the permutation.
template <int kZero, class S>
LK_INLINE void round_32(const S* x, float inverse, uint8_t* to) {
#if defined(__AVX512F__)
  const auto rounded = [&](int i) {
    return _mm512_cvtps_epi32((__m512)(load_wide(x + i * kLanes32) * inverse));
  };
  const __m256i packed = _mm512_cvtepi16_epi8(_mm512_packs_epi32(rounded(0), rounded(1)));
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
#else
  const auto rounded = [&](int i) {
    return _mm256_cvtps_epi32((__m256)(load_wide(x + i * kLanes32) * inverse));
  };
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(rounded(0), rounded(1)),
                                            _mm256_packs_epi32(rounded(2), rounded(3)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
#endif
  const __m256i q = _mm256_permutevar8x32_epi32(packed, order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_xor_si256(q, _mm256_set1_epi8(char(kZero))));
}
#endif

// A row times `inverse` as bytes q + kZero, every `depth` of them `step` after the last, zeros past
// its end; and the largest number of the next row: one is read while the other is rounded.
template <int kZero, class S, class Depth>
LK_INLINE float round_row(const S* x, const S* next, float inverse, int64_t cols, int64_t inputs,
                          Depth depth, uint8_t* to, int64_t step) {
  Largest largest;
  const auto round = [&](int64_t c, int64_t count) {
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 32 <= count; k += 32) {
      round_32<kZero>(x + c + k, inverse, to + k);
#pragma GCC unroll 4
      for (int i = 0; i < 32; i += kLanes32) largest.add_vector(next + c + k + i);
    }
#endif
#if defined(__AVX512F__)
    for (; k + kLanes32 <= count; k += kLanes32) {
      const __m512i q = _mm512_cvtps_epi32((__m512)(load_wide(x + c + k) * inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k),
                       _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(kZero))));
      largest.add_vector(next + c + k);
    }
#endif
    for (; k < count; ++k) {
      to[k] = uint8_t(int32_t(std::nearbyintf(float(widen(x[c + k])) * inverse)) + kZero);
      largest.add(next[c + k]);
    }
    for (; k < depth; ++k) to[k] = kZero;
  };
  int64_t c = 0;
  for (; c + depth <= cols; c += depth, to += step) round(c, depth);
  for (; c < inputs; c += depth, to += step) round(c, cols - c);
  return largest.get();
}

// Rows of x as bytes q + kZero, of 0 or 128, [inputs / depth][panel_rows][depth], and their scales:
// x is about scale * q, q from -127 to 127. A row that is not finite gets the scale NaN. A constant
// depth takes less time.
template <int kZero, class S, class Depth>
void quantise_rows(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t inputs,
                   Depth depth, uint8_t* panel, int64_t panel_rows, float* scales) {
  Largest first;
  int64_t c = 0;
  for (; c + kLanes32 <= cols; c += kLanes32) first.add_vector(x + c);
  for (; c < cols; ++c) first.add(x[c]);
  float largest = first.get();
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    const bool finite = largest <= __FLT_MAX__;
    scales[r] = finite ? largest / 127.0f : __builtin_nanf("");
    const float inverse = largest > 1e-36f && finite ? 127.0f / largest : 0.0f;
    largest = round_row<kZero>(x, r + 1 < rows ? x + ldx : x, inverse, cols, inputs, depth,
                               panel + r * depth, panel_rows * depth);
  }
}

// Turns the sums of a strip of outputs, from `out` on, into y.
template <class S, int V>
struct Int8Epilogue {
  static constexpr int kStrip = V * kLanes32;
  const Product& p;
  int64_t out, cols;
  bool direct;  // scaled sums are y
  float bias[kStrip] = {}, factor[kStrip] = {};

  Int8Epilogue(const Product& product, int64_t first)
      : p(product),
        out(first),
        cols(min_of<int64_t>(kStrip, product.out_features - first)),
        direct(sizeof(S) == sizeof(float) && cols == kStrip && !p.activation && !p.residual) {
    for (int64_t c = 0; c < cols; ++c) {
      factor[c] = p.weight_scales[out + c];
      if (p.bias) bias[c] = float(widen(static_cast<const S*>(p.bias)[out + c]));
    }
  }
  S* y(int64_t row) const { return static_cast<S*>(p.y) + row * p.ldy + out; }
  const S* residual(int64_t row) const {
    return p.residual ? static_cast<const S*>(p.residual) + row * p.ldr + out : nullptr;
  }
  // Has scale_to(to, ldt) store the scaled sums of rows from `row` on, and makes them y.
  template <class F>
  LK_INLINE void write(int64_t row, int64_t height, const F& scale_to) const {
    if (direct) return scale_to(reinterpret_cast<float*>(y(row)), p.ldy);
    float tile[kMostRows * kStrip];
    scale_to(tile, kStrip);
    finish(p.activation, tile, kStrip, int(height), cols, residual(row), p.ldr, y(row), p.ldy);
  }
  static constexpr int kMostRows = 32;
};

LK_INLINE Vec<float> scaled(Ints sum, Vec<float> factor, float scale, Vec<float> bias) {
  return __builtin_convertvector(sum, Vec<float>) * (factor * scale) + bias;
}

}  // namespace
}  // namespace lean_kernels

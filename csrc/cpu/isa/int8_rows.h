// SPDX-License-Identifier: Apache-2.0
// What the int8 kernels of block_sparse_linear share: rounding of x, and the epilogue.
#pragma once

#include <cmath>

#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

using Ints = Vec<int32_t>;
constexpr int kLanes32 = kLanes<int32_t>;

// Rows of x as bytes q + kZero, [input block][panel_rows][block_in], and their scales: x is about
// scale * q, q from -127 to 127. A row that is not finite gets the scale NaN.
template <int kZero, class S>
void quantise_rows(const S* x, int64_t ldx, int64_t rows, int64_t cols, int64_t block_in,
                   float* wide, uint8_t* panel, int64_t panel_rows, float* scales) {
  constexpr int W = kLanes<float>;
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    Vec<float> most = {}, check = {};
    int64_t c = 0;
    for (; c + W <= cols; c += W) {
      const Vec<float> v = load_wide(x + c);
      store(wide + c, v);
      const Vec<float> size = v < 0.0f ? -v : v;
      most = size > most ? size : most;
      check += v * 0.0f;
    }
    float largest = 0, finite = 0;
    for (int i = 0; i < W; ++i) {
      largest = most[i] > largest ? most[i] : largest;
      finite += check[i];
    }
    for (; c < cols; ++c) {
      wide[c] = float(widen(x[c]));
      largest = std::fabs(wide[c]) > largest ? std::fabs(wide[c]) : largest;
      finite += wide[c] * 0.0f;
    }
    scales[r] = largest / 127.0f + finite;
    const float inverse = largest > 1e-36f && finite == 0 ? 127.0f / largest : 0.0f;
    uint8_t* to = panel + r * block_in;
    for (int64_t b = 0; b < cols; b += block_in, to += panel_rows * block_in) {
      const int64_t n = min_of(block_in, cols - b);
      int64_t k = 0;
#if defined(__AVX512F__)
      for (; k + W <= n; k += W) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_loadu_ps(wide + b + k) * inverse);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + k),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(kZero))));
      }
#endif
      for (; k < n; ++k) to[k] = uint8_t(int32_t(std::nearbyintf(wide[b + k] * inverse)) + kZero);
      for (; k < block_in; ++k) to[k] = kZero;
    }
  }
}

// Turns the sums of a strip of outputs, from `out` on, into y.
template <class S, int V>
struct Int8Epilogue {
  static constexpr int kStrip = V * kLanes32;
  const Product& p;
  int64_t out, cols;
  float bias[kStrip] = {}, factor[kStrip] = {};

  Int8Epilogue(const Product& product, int64_t first)
      : p(product), out(first), cols(min_of<int64_t>(kStrip, product.out_features - first)) {
    for (int64_t c = 0; c < cols; ++c) {
      factor[c] = p.weight_scales[out + c];
      if (p.bias) bias[c] = float(widen(static_cast<const S*>(p.bias)[out + c]));
    }
  }
  S* y(int64_t row) const { return static_cast<S*>(p.y) + row * p.ldy + out; }
  const S* residual(int64_t row) const {
    return p.residual ? static_cast<const S*>(p.residual) + row * p.ldr + out : nullptr;
  }
  // sums [height][kStrip] belong to rows from `row` on, which have these scales.
  void write(const int32_t* sums, const float* scales, int64_t row, int64_t height) const {
    const auto scale_to = [&](float* to, int64_t ldt) {
      for (int64_t r = 0; r < height; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Ints sum = load(sums + (r * V + v) * kLanes32);
          store(to + r * ldt + v * kLanes32,
                __builtin_convertvector(sum, Vec<float>) *
                        (load(factor + v * kLanes32) * scales[r]) +
                    load(bias + v * kLanes32));
        }
    };
    if (sizeof(S) == sizeof(float) && cols == kStrip && !p.activation && !p.residual)
      return scale_to(reinterpret_cast<float*>(y(row)), p.ldy);
    float tile[kMostRows * kStrip];
    scale_to(tile, kStrip);
    finish(p.activation, tile, kStrip, int(height), cols, residual(row), p.ldr, y(row), p.ldy);
  }
  static constexpr int kMostRows = 32;
};

}  // namespace
}  // namespace lean_kernels

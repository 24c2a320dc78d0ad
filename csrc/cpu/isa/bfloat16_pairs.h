// SPDX-License-Identifier: Apache-2.0
// Packing of bfloat16 for products two inputs at a time (multiply_add.h).
#pragma once

#include "block_sparse_parts.h"
#include "multiply_add.h"

#if defined(__AVX512F__)
namespace lean_kernels {
namespace {

LK_INLINE __m512i load_halves(const BFloat16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// As the other pack_panel, for an even block_in.
inline void pack_panel(const BFloat16* x, int64_t ldx, int64_t rows, int64_t cols, int64_t block_in,
                       int32_t* panel, int64_t panel_rows) {
  constexpr int W = kVectorBytes / sizeof(BFloat16);
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    BFloat16* to = reinterpret_cast<BFloat16*>(panel) + r * block_in;
    for (int64_t c = 0; c < cols; c += block_in, to += panel_rows * block_in) {
      const int64_t n = min_of(block_in, cols - c);
      int64_t k = 0;
      for (; k + W <= n; k += W) memcpy(to + k, x + c + k, kVectorBytes);
      for (; k < n; ++k) to[k] = x[c + k];
      for (; k < block_in; ++k) to[k].bits = 0;
    }
  }
}

// As the other pack_blocks: [strip of outputs][entry][block_in / 2][strip].
template <class S>
void pack_blocks(const BlockMatrix& w, int64_t begin, int64_t end, int64_t strip, int32_t* to) {
  constexpr int W = kLanes<float>;
  const int64_t pairs = w.block_in / 2;
  for (int64_t o = 0; o < w.block_out; o += strip) {
    for (int64_t e = begin; e < end; ++e, to += pairs * strip) {
      const S* from = static_cast<const S*>(w.values) +
                      (w.position ? w.position[e] : e) * w.block_stride + o * w.out_stride;
      int64_t i = 0;
      if (w.out_stride == 1) {
        for (; i < pairs; ++i)
          for (int64_t c = 0; c < strip; c += W) {
            const S* even = from + 2 * i * w.in_stride + c;
            const __m512i odd = _mm512_slli_epi32(load_halves(even + w.in_stride), 16);
            _mm512_storeu_si512(to + i * strip + c, _mm512_or_si512(load_halves(even), odd));
          }
      } else if (w.in_stride == 1) {
        for (; i + W <= pairs; i += W)
          for (int64_t c = 0; c < strip; c += W) {
            Vec<int32_t> v[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) memcpy(&v[r], from + (c + r) * w.out_stride + 2 * i, 64);
            transpose<int32_t>(v);
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) store(to + (i + r) * strip + c, v[r]);
          }
      }
      for (; i < pairs; ++i)
        for (int64_t c = 0; c < strip; ++c) {
          const S* even = from + c * w.out_stride + 2 * i * w.in_stride;
          to[i * strip + c] = int32_t(even->bits | uint32_t(even[w.in_stride].bits) << 16);
        }
    }
  }
}

}  // namespace
}  // namespace lean_kernels
#endif

// SPDX-License-Identifier: Apache-2.0
// ragged_attention's products of bfloat16 by AMX: panels of 16 query rows, two at a time, with
// tiles of 32 keys or 32 columns of values. Rows past a panel's last are computed from whatever
// lies there and dropped: the next panel overwrites them, and a chunk's arrays have room for more.
#pragma once

#include "attention_chunk.h"

#if defined(__AVX512F__)
#include "amx_tiles.h"

namespace lean_kernels {
namespace {

struct BFloat16Tiles : BFloat16Pairs {
  static constexpr bool kTiles = true;
  static constexpr int kPanelRows = kTileRows;

  // Whole tiles of pairs, and rows whose largest product is the largest logit.
  static bool fit(const Attention& p) { return p.dim % 32 == 0 && p.scale > 0; }
};

// out [16 A, 16 B] = a [16 A, 16 steps pairs] b [16 steps pairs, 16 B]. Strides in elements.
template <int A, int B>
LK_INLINE void tile_product(const int32_t* a, int64_t a_panel, int64_t lda, const int32_t* b,
                            int64_t ldb, int64_t steps, float* out, int64_t out_panel,
                            int64_t ldo) {
  tile_zero<0>();
  if constexpr (B == 2) tile_zero<1>();
  if constexpr (A == 2) tile_zero<2>();
  if constexpr (A == 2 && B == 2) tile_zero<3>();
  for (; steps > 0; --steps, a += kTileRows, b += kTileRows * ldb) {
    tile_load<4>(a, 4 * lda);
    tile_load<6>(b, 4 * ldb);
    tile_multiply<float, 0, 4, 6>();
    if constexpr (B == 2) {
      tile_load<7>(b + kTileRows, 4 * ldb);
      tile_multiply<float, 1, 4, 7>();
    }
    if constexpr (A == 2) {
      tile_load<5>(a + a_panel, 4 * lda);
      tile_multiply<float, 2, 5, 6>();
      if constexpr (B == 2) tile_multiply<float, 3, 5, 7>();
    }
  }
  store_sums<A, B>(out, out_panel, ldo);
}

// Calls f(i, two) for the chunk's panels, two at once where both see the same keys.
template <class F>
LK_INLINE void each_pair(const Chunk& c, F f) {
  for (int64_t i = 0; i < c.panels; ++i) {
    const Span own = c.panel[i].keys, next = c.panel[min_of(i + 1, c.panels - 1)].keys;
    const bool two = i + 1 < c.panels && own.begin == next.begin && own.end == next.end;
    f(i, two);
    i += two;
  }
}

// As multiply_keys, without a multiplier.
inline void tiles_of_keys(const Chunk& c, const int32_t* rows, int64_t ld, const int32_t* keys,
                          int64_t key_count, int64_t depth, float* products, int64_t stride,
                          Prefetcher& prefetcher) {
  for (int64_t j = c.keys.begin; j < c.keys.end; j += 2 * kTileRows) {
    const bool wide = key_count - j > kTileRows;
    each_pair(c, [&](int64_t i, bool two) {
      const RowPanel& panel = c.panel[i];
      if (j < panel.keys.begin || j >= panel.keys.end) return;
      const auto product = two ? wide ? tile_product<2, 2> : tile_product<2, 1>
                               : wide ? tile_product<1, 2> : tile_product<1, 1>;
      product(rows + panel.begin * ld, panel.rows * ld, ld, keys + j * depth,
              wide ? 2 * kTileRows : kTileRows, depth / kTileRows,
              products + panel.begin * stride + j, panel.rows * stride, stride);
      prefetcher.ask();
      if (two) prefetcher.ask();
    });
  }
}

// As multiply_values, into sums alone. Weights are pairs, zeros up to a multiple of 32 keys.
inline void tiles_of_values(const Chunk& c, const int32_t* weights, int64_t stride,
                            const Strips<int32_t>& values, int64_t dim, float* sums, int64_t ld,
                            Prefetcher& prefetcher) {
  each_pair(c, [&](int64_t i, bool two) {
    const RowPanel& panel = c.panel[i];
    const int64_t begin = panel.keys.begin / 2;
    const int64_t steps = ceil_div(panel.keys.end - panel.keys.begin, 2 * kTileRows);
    for (int64_t d = 0; d < dim; d += 2 * kTileRows) {
      const auto product = two ? tile_product<2, 2> : tile_product<1, 2>;
      product(weights + panel.begin * stride + begin, panel.rows * stride, stride,
              values.data + d * values.step + begin * 2 * kTileRows, 2 * kTileRows, steps,
              sums + panel.begin * ld + d, panel.rows * ld, ld);
      prefetcher.ask();
      if (two) prefetcher.ask();
    }
  });
}

}  // namespace
}  // namespace lean_kernels
#endif

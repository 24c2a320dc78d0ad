// SPDX-License-Identifier: Apache-2.0
// block_sparse_linear by AMX: bfloat16, and int8 weights.
//
// A pair of tiles holds 32 rows of x, another 32 outputs' weights of one entry: four products of
// 16 x 16 sums for four loads. Bfloat16 weights are packed into pairs of inputs, group by group,
// and x is read where it is; int8 weights lie as the tiles want them, and x is packed as it is
// rounded. Rows past the last are computed and dropped: a row's result does not depend on the
// batch.
#include "../isa.h"

#if defined(__AVX512F__)
#include <algorithm>
#include <array>

#include "amx_tiles.h"
#include "bfloat16_pairs.h"
#include "int8_rows.h"

namespace lean_kernels {
namespace {

constexpr int kStrip = kTileRows;  // outputs of a tile
constexpr int kMostSums = 4 * kTileRows * kTileRows;

// Bytes of an input block that one product sums over: a divisor of the block. Less than half a tile
// is left to the vectors.
int64_t tile_depth(int64_t block_bytes) {
  int64_t depth = std::min<int64_t>(kTileBytes, block_bytes) / 4 * 4;
  while (depth > 0 && block_bytes % depth) depth -= 4;
  return depth;
}
bool fits_tiles(const BlockMatrix& w, int64_t size) {
  return w.block_out % kStrip == 0 && tile_depth(w.block_in * size) >= kTileBytes / 2;
}

// What the products of a group walk over; strides in bytes.
struct Walk {
  const int32_t* index = nullptr;
  int64_t count = 0;            // entries
  int64_t steps, depth;         // products of an entry, bytes of x each
  const char* x = nullptr;      // [panel][input block][16 rows][block]
  int64_t x_panel, x_block, x_row;
  const char* w = nullptr;      // [strip][entry][step] tiles of rows
  int64_t w_strip = 0, w_entry, w_step, w_row;
};

// out [16 A, 16 B] = init + the products of A panels of rows and B strips of outputs.
template <class Sum, int A, int B>
void sum_tiles(const Walk& t, const Sum* init, Sum* out) {
  load_sums<A, B>(init);
  for (int64_t e = 0; e < t.count; ++e) {
    const char* x = t.x + t.index[e] * t.x_block;
    const char* w = t.w + e * t.w_entry;
    for (int64_t s = 0; s < t.steps; ++s, x += t.depth, w += t.w_step) {
      tile_load<4>(x, t.x_row);
      tile_load<6>(w, t.w_row);
      tile_multiply<Sum, 0, 4, 6>();
      if constexpr (B == 2) {
        tile_load<7>(w + t.w_strip, t.w_row);
        tile_multiply<Sum, 1, 4, 7>();
      }
      if constexpr (A == 2) {
        tile_load<5>(x + t.x_panel, t.x_row);
        tile_multiply<Sum, 2, 5, 6>();
        if constexpr (B == 2) tile_multiply<Sum, 3, 5, 7>();
      }
    }
  }
  store_sums<A, B>(out, kTileRows * B * kStrip, B * kStrip);
}

template <class Sum, int B>
void sum_rows(const Walk& t, int64_t height, const Sum* init, Sum* out) {
  height > kTileRows ? sum_tiles<Sum, 2, B>(t, init, out) : sum_tiles<Sum, 1, B>(t, init, out);
}

// Bytes of x's panels.
int64_t panel_bytes(const Product& p, int64_t rows, int64_t size) {
  return ceil_div(rows, kTileRows) * kTileRows * padded_inputs(p) * size;
}

// The panels of a task's rows, each of 16.
template <class F>
void each_panel(int64_t rows, const F& f) {
  for (int64_t at = 0; at < rows; at += kTileRows) f(at, min_of<int64_t>(kTileRows, rows - at));
}

LK_INLINE void store_pairs(BFloat16* y, Vec<float> low, Vec<float> high) {
  __m512i halves;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(low), "v"(high));
  _mm512_storeu_si512(y, halves);
}

template <int B>
void finish_pairs(const Product& p, const float* sums, int64_t row, int64_t height, int64_t out) {
  constexpr int kCols = B * kStrip;
  const int64_t cols = min_of<int64_t>(kCols, p.out_features - out);
  BFloat16* y = static_cast<BFloat16*>(p.y) + row * p.ldy + out;
  const BFloat16* residual =
      p.residual ? static_cast<const BFloat16*>(p.residual) + row * p.ldr + out : nullptr;
  if (B == 2 && cols == kCols && !p.activation && !residual) {
    for (int64_t r = 0; r < height; ++r)
      store_pairs(y + r * p.ldy, load(sums + r * kCols), load(sums + r * kCols + kStrip));
    return;
  }
  finish(p.activation, sums, kCols, int(height), cols, residual, p.ldr, y, p.ldy);
}

// A group's weights as [strip][entry][pair of inputs][16 outputs].
void pack_weights(const BlockMatrix& w, int64_t begin, int64_t end, int32_t* to) {
  if (w.out_stride != 1 || w.block_out % (2 * kStrip) || w.block_in % 2)
    return pack_blocks<BFloat16>(w, begin, end, kStrip, to);
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 64> order{};
    for (int i = 0; i < 64; ++i) order[i] = int16_t(i / 2 + (i % 2 ? 32 : 0));
    return order;
  }();
  const __m512i low = _mm512_load_si512(kOrder.data()), high = _mm512_load_si512(&kOrder[32]);
  const int64_t entry = w.block_in / 2 * kStrip, strip = (end - begin) * entry;
  for (int64_t e = begin; e < end; ++e, to += entry) {
    const BFloat16* from = static_cast<const BFloat16*>(w.values) +
                           (w.position ? w.position[e] : e) * w.block_stride;
    for (int64_t o = 0; o < w.block_out; o += 2 * kStrip) {
      int32_t* at = to + o / kStrip * strip;
      for (int64_t i = 0; i < w.block_in; i += 2, at += kStrip) {
        const __m512i even = _mm512_loadu_si512(from + i * w.in_stride + o);
        const __m512i odd = _mm512_loadu_si512(from + (i + 1) * w.in_stride + o);
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(at + strip, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

void product_pairs(const Product& p, const Range& t, void* scratch) {
  const BlockMatrix& w = p.w;
  if (!fits_tiles(w, sizeof(BFloat16)))
    return LEAN_KERNELS_ISA::block_sparse[kBFloat16].product(p, t, scratch);
  const int64_t rows = t.row_end - t.row_begin, block = w.block_in * sizeof(BFloat16);
  const int64_t depth = tile_depth(block), panel = kTileRows * padded_inputs(p) * 2;
  constexpr int64_t kPair = 2 * kTileRows;
  // Whole pairs of panels are read where they are, unless the last block is over the edge.
  const int64_t in_place = p.in_features % w.block_in == 0 ? rows / kPair * kPair : 0;
  char* xs = static_cast<char*>(scratch);
  char* packed = xs + panel_bytes(p, rows, sizeof(BFloat16));
  const BFloat16* x = static_cast<const BFloat16*>(p.x) + t.row_begin * p.ldx;
  each_panel(rows - in_place, [&](int64_t at, int64_t height) {
    pack_panel(x + (in_place + at) * p.ldx, p.ldx, height, p.in_features, w.block_in,
               reinterpret_cast<int32_t*>(xs + at / kTileRows * panel), kTileRows);
  });
  const TileRegisters registers(depth);
  alignas(64) float sums[kMostSums], bias[2 * kStrip];
  Walk packed_rows{.steps = block / depth, .depth = depth, .x = xs, .x_panel = panel,
                   .x_block = kTileRows * block, .x_row = block, .w_entry = block / 4 * kTileBytes,
                   .w_step = depth / 4 * kTileBytes, .w_row = kTileBytes};
  Walk given_rows = packed_rows;
  given_rows.x = reinterpret_cast<const char*>(x);
  given_rows.x_row = p.ldx * 2;
  given_rows.x_panel = kTileRows * given_rows.x_row;
  given_rows.x_block = block;
  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g], count = w.ptr[g + 1] - begin;
    pack_weights(w, begin, begin + count, reinterpret_cast<int32_t*>(packed));
    for (int64_t o = 0; o < w.block_out; o += 2 * kStrip) {
      const int64_t out = g * w.block_out + o;
      if (out >= p.out_features) break;
      const bool two = o + kStrip < w.block_out;
      for (int64_t c = 0; c < 2 * kStrip; ++c)
        bias[c] = p.bias && out + c < p.out_features
                      ? widen(static_cast<const BFloat16*>(p.bias)[out + c])
                      : 0;
      for (int64_t at = 0; at < rows; at += kPair) {
        const int64_t height = min_of(kPair, rows - at);
        Walk walk = at < in_place ? given_rows : packed_rows;
        walk.index = w.index + begin;
        walk.count = count;
        walk.w_strip = count * walk.w_entry;
        walk.w = packed + o / kStrip * walk.w_strip;
        walk.x += (at < in_place ? at : at - in_place) / kTileRows * walk.x_panel;
        if (two) {
          sum_rows<float, 2>(walk, height, bias, sums);
          finish_pairs<2>(p, sums, t.row_begin + at, height, out);
        } else {
          sum_rows<float, 1>(walk, height, bias, sums);
          finish_pairs<1>(p, sums, t.row_begin + at, height, out);
        }
      }
    }
  }
}

template <class S, int B>
void product_bytes_by(const Product& p, const Range& t, void* scratch) {
  const BlockMatrix& w = p.w;
  const int64_t rows = t.row_end - t.row_begin, x_panel = kTileRows * padded_inputs(p);
  const int64_t depth = tile_depth(w.block_in);
  uint8_t* xs = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(xs + panel_bytes(p, rows, 1));
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  each_panel(rows, [&](int64_t at, int64_t height) {
    quantise_rows<0>(x + at * p.ldx, p.ldx, height, p.in_features, padded_inputs(p), w.block_in,
                     xs + at / kTileRows * x_panel, kTileRows, scales + at);
  });
  const TileRegisters registers(depth);
  alignas(64) int32_t sums[kMostSums];
  alignas(64) const int32_t zeros[2 * kStrip] = {};
  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g];
    Walk walk{.index = w.index + begin, .count = w.ptr[g + 1] - begin,
              .steps = w.block_in / depth, .depth = depth, .x_panel = x_panel,
              .x_block = kTileRows * w.block_in, .x_row = w.block_in, .w_strip = kTileBytes,
              .w_entry = w.block_stride, .w_step = depth / 4 * w.in_stride, .w_row = w.in_stride};
    for (int64_t o = 0; o < w.block_out; o += B * kStrip) {
      const int64_t out = g * w.block_out + o;
      if (out >= p.out_features) break;
      const Int8Epilogue<S, B> epilogue(p, out);
      walk.w = static_cast<const char*>(w.values) + begin * w.block_stride + 4 * o;
      for (int64_t at = 0; at < rows; at += 2 * kTileRows) {
        const int64_t height = min_of<int64_t>(2 * kTileRows, rows - at);
        walk.x = reinterpret_cast<const char*>(xs) + at / kTileRows * x_panel;
        sum_rows<int32_t, B>(walk, height, zeros, sums);
        epilogue.write(t.row_begin + at, height, [&](float* to, int64_t ldt) {
          for (int64_t r = 0; r < height; ++r)
            for (int v = 0; v < B; ++v)
              store(to + r * ldt + v * kStrip,
                    scaled(load(sums + (r * B + v) * kStrip), load(epilogue.factor + v * kStrip),
                           scales[at + r], load(epilogue.bias + v * kStrip)));
        });
      }
    }
  }
}

template <class S, Dtype kDtype>
void product_bytes(const Product& p, const Range& t, void* scratch) {
  if (!fits_tiles(p.w, 1))
    return LEAN_KERNELS_ISA::block_sparse_int8[kDtype].product(p, t, scratch);
  if (p.w.block_out % (2 * kStrip) == 0) return product_bytes_by<S, 2>(p, t, scratch);
  product_bytes_by<S, 1>(p, t, scratch);
}

size_t pairs_scratch(const Product& p, int64_t rows) {
  if (!fits_tiles(p.w, sizeof(BFloat16)))
    return LEAN_KERNELS_ISA::block_sparse[kBFloat16].product_scratch(p, rows);
  return panel_bytes(p, rows, 2) + p.max_entries * p.w.block_in * p.w.block_out * 2;
}
template <Dtype kDtype>
size_t bytes_scratch(const Product& p, int64_t rows) {
  if (!fits_tiles(p.w, 1))
    return LEAN_KERNELS_ISA::block_sparse_int8[kDtype].product_scratch(p, rows);
  return panel_bytes(p, rows, 1) + 4 * rows;  // and scales
}

RowSplit pairs_rows(const Product& p) {
  if (!fits_tiles(p.w, sizeof(BFloat16)))
    return LEAN_KERNELS_ISA::block_sparse[kBFloat16].product_rows(p);
  constexpr int64_t unit = 2 * kTileRows;
  // A task packs its rows and its groups' weights: cut what costs less to pack twice.
  const int64_t kept = p.w.ptr[p.w.groups] * p.w.block_in * p.w.block_out;
  return {kTileRows, std::max(2 * unit, kTilePanelBytes / (padded_inputs(p) * 2) / unit * unit),
          std::max(unit, kept / p.in_features), unit, kTileSerialFlop};
}
template <Dtype kDtype>
RowSplit bytes_rows(const Product& p) {
  if (!fits_tiles(p.w, 1)) return LEAN_KERNELS_ISA::block_sparse_int8[kDtype].product_rows(p);
  constexpr int64_t unit = 2 * kTileRows;
  return {kTileRows, std::max(2 * unit, kTilePanelBytes / padded_inputs(p) / unit * unit), unit,
          kTileRows, kTileSerialFlop};
}

template <class S, Dtype kDtype>
constexpr BlockSparseKernels bytes_kernels() {
  return {bytes_rows<kDtype>, bytes_scratch<kDtype>, product_bytes<S, kDtype>, nullptr, nullptr};
}

}  // namespace

const BlockSparseKernels LEAN_KERNELS_ISA::amx_block_sparse_bfloat16 = {
    pairs_rows, pairs_scratch, product_pairs, nullptr, nullptr};
const BlockSparseKernels LEAN_KERNELS_ISA::amx_block_sparse_int8[kDtypes] = {
    bytes_kernels<float, kFloat32>(), bytes_kernels<BFloat16, kBFloat16>(),
    bytes_kernels<Float16, kFloat16>(), {}};

}  // namespace lean_kernels
#endif

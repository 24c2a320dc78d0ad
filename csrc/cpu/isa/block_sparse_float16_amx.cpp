// SPDX-License-Identifier: Apache-2.0
// block_sparse_linear of float16 by AMX, which multiplies bfloat16 and sums in float32.
//
// A float16 is the sum of two bfloat16 parts, exactly; the product of the small parts, below 2^-18
// of the whole, is left out. (Sums in float16 itself may run over four products before their errors
// pass twice those of rounding the result; flushed that often they are slower than float32's.) What
// is not finite has no such parts: rows of x and groups of weights with infinity or NaN go to the
// vectors.
#include "../isa.h"

#if defined(__AVX512F__)
#include <algorithm>
#include <iterator>

#include "amx_tiles.h"
#include "block_sparse_parts.h"

namespace lean_kernels {
namespace {

constexpr int64_t kPair = 2 * kTileRows;  // rows, and outputs, of a pair of tiles

struct Term {
  int x, w;  // parts multiplied, 0 the largest
};
// In an order that keeps a part in its register for the next term.
constexpr Term kTerms[] = {{1, 0}, {0, 0}, {0, 1}};
constexpr int kParts = 2, kTermCount = std::size(kTerms), kLeastDepth = 16;

// How the blocks of a product are cut into tiles, whose inputs k and k + half lie side by side.
struct Cut {
  int64_t half, steps, tile, entry;  // steps of an input block; bytes of a tile and of a block

  explicit Cut(const BlockMatrix& w) : half(std::min<int64_t>(kTileRows, w.block_in / 2)) {
    while (half > 0 && w.block_in % (2 * half)) --half;
    steps = half ? w.block_in / (2 * half) : 0;
    tile = kTileRows * half * 4;
    entry = steps * kParts * tile;
  }
};

bool fits_tiles(const BlockMatrix& w) {
  return w.block_out % kTileRows == 0 && 2 * Cut(w).half >= kLeastDepth;
}

const BlockSparseKernels& by_vectors() {
  return LEAN_KERNELS_ISA::block_sparse[kFloat16];
}

LK_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= kTileRows ? __mmask16(-1) : n <= 0 ? __mmask16(0) : __mmask16((1 << n) - 1);
}
LK_INLINE Vec<float> load_first(const Float16* p, int64_t n) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

// Writes the parts of a and b as pairs, `lanes` of them, each part `stride` bytes after the one
// before. Returns 0, or NaN in lanes that are not finite.
LK_INLINE Vec<float> split(Vec<float> a, Vec<float> b, char* to, int64_t stride, __mmask16 lanes) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  constexpr uint32_t kUpper = 0xffff0000;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const bool last = part + 1 == kParts;  // whose lower half is empty
    const Bits low = (Bits)a + (last ? 0 : 0x8000), high = (Bits)b + (last ? 0 : 0x8000);
    _mm512_mask_storeu_epi32(to + part * stride, lanes, (__m512i)(low >> 16 | (high & kUpper)));
    if (last) continue;
    a -= (Vec<float>)(low & kUpper);
    b -= (Vec<float>)(high & kUpper);
  }
  return a * 0.0f + b * 0.0f;
}
LK_INLINE bool all_zero(Vec<float> v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
}

// Rows of x as [input block][step][part] tiles of [16 rows][pair]; `spoilt` says which rows are not
// finite.
void pack_rows(const Float16* x, int64_t ldx, int64_t rows, int64_t cols, const Cut& cut,
               char* panel, bool* spoilt) {
  const __mmask16 lanes = first_lanes(cut.half);
  for (int64_t r = 0; r < rows; ++r, x += ldx) {
    Vec<float> check = {};
    char* to = panel + r * cut.half * 4;
    for (int64_t c = 0; c < cols;)
      for (int64_t s = 0; s < cut.steps; ++s, c += 2 * cut.half, to += kParts * cut.tile) {
        const int64_t low = min_of(cut.half, cols - c);
        const int64_t high = min_of(cut.half, cols - c - cut.half);
        check += split(load_first(x + c, low), load_first(x + c + cut.half, high), to,
                               cut.tile, lanes);
      }
    spoilt[r] = !all_zero(check);
  }
}

// A group's weights as [strip of 16 outputs][entry][step][part] tiles of [pair][16 outputs].
// Returns whether all are finite.
bool pack_weights(const BlockMatrix& w, int64_t begin, int64_t end, const Cut& cut, char* packed) {
  const int64_t strip = (end - begin) * cut.entry;
  Vec<float> check = {};
  for (int64_t e = begin; e < end; ++e)
    for (int64_t o = 0; o < w.block_out; o += kTileRows) {
      const Float16* from = static_cast<const Float16*>(w.values) +
                      (w.position ? w.position[e] : e) * w.block_stride + o * w.out_stride;
      char* to = packed + o / kTileRows * strip + (e - begin) * cut.entry;
      for (int64_t s = 0; s < cut.steps; ++s, to += kParts * cut.tile) {
        const auto write = [&](int64_t k, Vec<float> low, Vec<float> high) {
          check += split(low, high, to + k * kTileBytes, cut.tile, __mmask16(-1));
        };
        const Float16* at = from + 2 * s * cut.half * w.in_stride;
        const int64_t high = cut.half * w.in_stride;
        if (w.out_stride == 1) {
          for (int64_t k = 0; k < cut.half; ++k, at += w.in_stride)
            write(k, load_wide(at), load_wide(at + high));
          continue;
        }
        Vec<float> v[2][kTileRows];
        for (int i = 0; i < kTileRows; ++i, at += w.out_stride)
          if (w.in_stride == 1) {
            v[0][i] = load_first(at, cut.half);
            v[1][i] = load_first(at + high, cut.half);
          } else {
            for (int64_t k = 0; k < kTileRows; ++k) {
              v[0][i][k] = k < cut.half ? widen(at[k * w.in_stride]) : 0;
              v[1][i][k] = k < cut.half ? widen(at[k * w.in_stride + high]) : 0;
            }
          }
        transpose<float>(v[0]);
        transpose<float>(v[1]);
        for (int64_t k = 0; k < cut.half; ++k) write(k, v[0][k], v[1][k]);
      }
    }
  return all_zero(check);
}

// What the products of a group walk over: tiles of x and weights.
struct Walk {
  const int32_t* index;
  int64_t count;  // entries
  const char* x;  // [panel][input block]
  int64_t x_panel;
  const char* w;  // [strip][entry]
};

// out [16 A, 16 B] = init + the products of A panels of rows and B strips of outputs.
template <int A, int B>
void sum_tiles(const Walk& t, const Cut& cut, const float* init, float* out, int64_t ldo) {
  const int64_t x_row = cut.half * 4, tile = cut.tile, strip = t.count * cut.entry;
  load_sums<A, B>(init);
  const char* w = t.w;
  for (int64_t e = 0; e < t.count; ++e) {
    const char* x = t.x + t.index[e] * cut.entry;
    for (int64_t s = 0; s < cut.steps; ++s, x += kParts * tile, w += kParts * tile) {
      // The next tiles of x come from L2, or are the first of the next rows.
      const char* next = s + 1 < cut.steps   ? x + kParts * tile
                         : e + 1 < t.count ? t.x + t.index[e + 1] * cut.entry
                                           : t.x + A * t.x_panel + t.index[0] * cut.entry;
      constexpr int kLines = kParts * kTileRows / kTermCount;
      Term held{-1, -1};
#pragma GCC unroll 8
      for (const Term term : kTerms) {
        if (term.x != held.x) {
          tile_load<4>(x + term.x * tile, x_row);
          if constexpr (A == 2) tile_load<5>(x + t.x_panel + term.x * tile, x_row);
        }
        if (term.w != held.w) {
          tile_load<6>(w + term.w * tile, kTileBytes);
          if constexpr (B == 2) tile_load<7>(w + strip + term.w * tile, kTileBytes);
        }
        held = term;
        for (int i = 0; i < kLines; ++i, next += 64) {
          __builtin_prefetch(next);
          if constexpr (A == 2) __builtin_prefetch(next + t.x_panel);
        }
        tile_multiply<float, 0, 4, 6>();
        if constexpr (B == 2) tile_multiply<float, 1, 4, 7>();
        if constexpr (A == 2) tile_multiply<float, 2, 5, 6>();
        if constexpr (A == 2 && B == 2) tile_multiply<float, 3, 5, 7>();
      }
    }
  }
  store_sums<A, B>(out, kTileRows * ldo, ldo);
}

// Bytes of x's panels, and of a group's weights.
int64_t panel_bytes(const Product& p) {
  return kTileRows * padded_inputs(p) * 2 * kParts;
}
int64_t weight_bytes(const Product& p) {
  return p.max_entries * p.w.block_in * p.w.block_out * 2 * kParts;
}

template <int B>
void product_strips(const Product& p, const Range& t, char* scratch) {
  constexpr int kCols = B * kTileRows;
  const BlockMatrix& w = p.w;
  const Cut cut(w);
  const int64_t rows = t.row_end - t.row_begin, panel = panel_bytes(p);
  // Scratch: panels of x, a group's weights, spoilt rows, and what the vectors take.
  char* packed = scratch + ceil_div(rows, kTileRows) * panel;
  bool* spoilt = reinterpret_cast<bool*>(packed + weight_bytes(p));
  char* rest = reinterpret_cast<char*>(spoilt) + ceil_div(rows, 64) * 64;
  const Float16* x = static_cast<const Float16*>(p.x) + t.row_begin * p.ldx;
  for (int64_t at = 0; at < rows; at += kTileRows)
    pack_rows(x + at * p.ldx, p.ldx, min_of<int64_t>(kTileRows, rows - at), p.in_features, cut,
              scratch + at / kTileRows * panel, spoilt + at);
  const TileRegisters registers(cut.half * 4);
  alignas(64) float sums[kPair * kCols], bias[kCols];
  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g], count = w.ptr[g + 1] - begin;
    if (!pack_weights(w, begin, begin + count, cut, packed)) {
      by_vectors().product(p, {t.row_begin, t.row_end, g, g + 1}, rest);
      continue;
    }
    for (int64_t o = 0; o < w.block_out; o += kCols) {
      const int64_t out = g * w.block_out + o, cols = min_of<int64_t>(kCols, p.out_features - out);
      if (cols <= 0) break;
      for (int64_t c = 0; c < kCols; ++c)
        bias[c] = p.bias && c < cols ? widen(static_cast<const Float16*>(p.bias)[out + c]) : 0;
      const bool plain = cols == kCols && !p.activation && !p.residual;
      for (int64_t at = 0; at < rows; at += kPair) {
        const int64_t height = min_of(kPair, rows - at), row = t.row_begin + at;
        const Walk walk{w.index + begin, count, scratch + at / kTileRows * panel, panel,
                        packed + o / kTileRows * count * cut.entry};
        Float16* y = static_cast<Float16*>(p.y) + row * p.ldy + out;
        const Float16* ahead = at + kPair < rows ? y + kPair * p.ldy : y - at * p.ldy + kCols;
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < kCols; c += 64 / sizeof(Float16))
            __builtin_prefetch(ahead + r * p.ldy + c, 1);
        const auto run = height > kTileRows ? sum_tiles<2, B> : sum_tiles<1, B>;
        run(walk, cut, bias, sums, kCols);
        if (plain) {
          for (int64_t r = 0; r < height; ++r)
            for (int64_t c = 0; c < kCols; c += kTileRows)
              store_narrow(y + r * p.ldy + c, load(sums + r * kCols + c));
          continue;
        }
        const Float16* residual =
            p.residual ? static_cast<const Float16*>(p.residual) + row * p.ldr + out : nullptr;
        finish(p.activation, sums, kCols, int(height), cols, residual, p.ldr, y, p.ldy);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    if (spoilt[r])
      by_vectors().product(
          p, {t.row_begin + r, t.row_begin + r + 1, t.group_begin, t.group_end}, rest);
}

void product(const Product& p, const Range& t, void* scratch) {
  if (!fits_tiles(p.w)) return by_vectors().product(p, t, scratch);
  if (p.w.block_out % kPair == 0) return product_strips<2>(p, t, static_cast<char*>(scratch));
  product_strips<1>(p, t, static_cast<char*>(scratch));
}

size_t product_scratch(const Product& p, int64_t rows) {
  const size_t vectors = by_vectors().product_scratch(p, rows);
  if (!fits_tiles(p.w)) return vectors;
  return ceil_div(rows, kTileRows) * panel_bytes(p) + weight_bytes(p) +
         ceil_div(rows, 64) * 64 + vectors;
}

RowSplit product_rows(const Product& p) {
  if (!fits_tiles(p.w)) return by_vectors().product_rows(p);
  // A task packs its rows and its groups' weights: cut what costs less to pack twice.
  const int64_t kept = p.w.ptr[p.w.groups] * p.w.block_in * p.w.block_out;
  return {kTileRows, std::max(2 * kPair, kTilePanelBytes / panel_bytes(p) / 2 * kPair),
          std::max(kPair, kept / p.in_features), kPair,
          kTileSerialFlop / kTermCount};
}

}  // namespace

const BlockSparseKernels LEAN_KERNELS_ISA::amx_block_sparse_float16 = {
    product_rows, product_scratch, product, nullptr, nullptr};

}  // namespace lean_kernels
#endif

// SPDX-License-Identifier: Apache-2.0
// block_sparse_linear over int8 weights: rows of x are quantised to int8 while they are packed, the
// products summed in int32, and scaled back with the epilogue.
//
// The byte products take one unsigned factor, so x is stored as q + 128, and 128 times the sum of
// an output's weights is taken off again. Integer sums are exact: their order does not matter.
#include "../isa.h"

#include <algorithm>

#include "int8_rows.h"

namespace lean_kernels {
namespace {

// Four weights of each of a vector's outputs, as the products want them.
#if defined(__AVX512VNNI__)
struct Weights {
  __m512i bytes;
  LK_INLINE explicit Weights(const int8_t* p) : bytes(_mm512_loadu_si512(p)) {}
};
LK_INLINE Ints add_products(Ints sum, const Weights& w, int32_t x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), w.bytes);
}
#elif defined(__AVX512BW__)
struct Weights {
  __m512i even, odd;  // sign-extended to 16 bits
  LK_INLINE explicit Weights(const int8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
    odd = _mm512_srai_epi16(bytes, 8);
  }
};
LK_INLINE Ints add_products(Ints sum, const Weights& w, int32_t x) {
  const __m512i even = _mm512_set1_epi32(x & 0x00ff00ff);
  const __m512i odd = _mm512_set1_epi32(int32_t(uint32_t(x) >> 8 & 0x00ff00ff));
  return sum + (Ints)_mm512_madd_epi16(w.even, even) + (Ints)_mm512_madd_epi16(w.odd, odd);
}
#elif defined(__AVX2__)
struct Weights {
  __m256i even, odd;
  LK_INLINE explicit Weights(const int8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    odd = _mm256_srai_epi16(bytes, 8);
  }
};
LK_INLINE Ints add_products(Ints sum, const Weights& w, int32_t x) {
  const __m256i even = _mm256_set1_epi32(x & 0x00ff00ff);
  const __m256i odd = _mm256_set1_epi32(int32_t(uint32_t(x) >> 8 & 0x00ff00ff));
  return sum + (Ints)_mm256_madd_epi16(w.even, even) + (Ints)_mm256_madd_epi16(w.odd, odd);
}
#else
struct Weights {
  Ints part[4];
  LK_INLINE explicit Weights(const int8_t* p) {
    for (int i = 0; i < 4 * kLanes32; ++i) part[i % 4][i / 4] = p[i];
  }
};
LK_INLINE Ints add_products(Ints sum, const Weights& w, int32_t x) {
  for (int i = 0; i < 4; ++i) sum += w.part[i] * int32_t(uint32_t(x) >> 8 * i & 255);
  return sum;
}
#endif

LK_INLINE int32_t four_bytes(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// One group's entries; weights [entry][block_in / 4][block_out][4].
struct Entries8 {
  const int32_t* index;
  int64_t count;
  const int8_t* w;
  int64_t block, w_step;  // bytes from entry to entry, and from four inputs to the next four
  int64_t block_in;
};

constexpr int kFewRows = kWideRows < 8 ? kWideRows : 8;  // for which weights have to be fetched
constexpr int64_t kAhead = 2048;  // bytes of weights asked for ahead
constexpr int32_t kOnes = 0x01010101;

// What turns sums of a strip into floats.
template <int V>
struct Scaling {
  Vec<float> factor[V], bias[V];
};

// out [R, V vectors] = (init + the products of a panel [inputs / D][R][D]) scaled. kParts sums run
// side by side where few rows leave the multiplier idle. Without init, weights are summed as they
// pass: a pass of its own over many weights would take longer than few rows do.
template <int R, int V, int D, int kParts, bool kInit>
void tile_int8(const Entries8& e, const uint8_t* x, const Ints* init, const Scaling<V>& by,
               const float* scales, float* out, int64_t ldo) {
  constexpr int kSums = kInit ? R : R + 1;  // the last of the weights alone
  Ints acc[kParts][kSums][V];
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 12
    for (int r = 0; r < kSums; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[p][r][v] = p || !kInit ? Ints{} : init[v];
  for (int64_t i = 0; i < e.count; ++i) {
    const uint8_t* xb = x + e.index[i] * (R * e.block_in);
    const int8_t* wk = e.w + i * e.block;
#pragma GCC unroll 1
    for (int64_t k = 0; k < e.block_in; k += D, xb += R * D)
#pragma GCC unroll 1
      for (int d = 0; d < D; d += 4 * kParts)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p, wk += e.w_step) {
          const Weights w[2] = {Weights(wk), Weights(wk + (V - 1) * 4 * kLanes32)};
          if constexpr (!kInit)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) __builtin_prefetch(wk + kAhead + 4 * v * kLanes32);
#pragma GCC unroll 12
          for (int r = 0; r < kSums; ++r) {
            const int32_t four = r < R ? four_bytes(xb + r * D + d + 4 * p) : kOnes;
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
              acc[p][r][v] = add_products(acc[p][r][v], w[v], four);
          }
        }
  }
  const auto total = [&](int r, int v) {
    Ints sum = acc[0][r][v];
#pragma GCC unroll 4
    for (int p = 1; p < kParts; ++p) sum += acc[p][r][v];
    return sum;
  };
  Ints less[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) less[v] = kInit ? Ints{} : total(kSums - 1, v) * 128;
  const Scaling<V> scaling = by;  // which `out` cannot change
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const float scale = scales[r];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Ints sum = kInit ? total(r, v) : total(r, v) - less[v];
      store(out + r * ldo + v * kLanes32, scaled(sum, scaling.factor[v], scale, scaling.bias[v]));
    }
  }
}

template <int V>
using TileInt8 = void (*)(const Entries8&, const uint8_t*, const Ints*, const Scaling<V>&,
                          const float*, float*, int64_t);

template <int V, int D, bool kInit, int R>
TileInt8<V> tile_of_height(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    constexpr int kParts = D < 16 ? 1 : R <= 2 ? 4 : R <= 4 ? 2 : 1;
    return rows == R ? tile_int8<R, V, D, kParts, kInit> : tile_of_height<V, D, kInit, R - 1>(rows);
  }
}
template <int V, int D>
TileInt8<V> tile_of_height(int64_t rows, bool init) {
  return init ? tile_of_height<V, D, true, kWideRows>(rows)
              : tile_of_height<V, D, false, kFewRows>(rows);
}

// Inputs of a row that lie together in a panel.
int64_t panel_depth(const BlockMatrix& w) {
  return w.block_in % 32 == 0 ? 32 : w.block_in % 16 == 0 ? 16 : 4;
}
template <int V>
TileInt8<V> tile_for(int64_t rows, int64_t depth, bool init) {
  return depth == 32   ? tile_of_height<V, 32>(rows, init)
         : depth == 16 ? tile_of_height<V, 16>(rows, init)
                       : tile_of_height<V, 4>(rows, init);
}

// -128 times the sum of each output's weights.
template <int V>
void correction(const Entries8& e, Ints* init) {
  constexpr int kChains = 4;
  Ints sum[kChains][V] = {};
  const auto add = [&](Ints* sums, const int8_t* w) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sums[v] = add_products(sums[v], Weights(w + 4 * v * kLanes32), kOnes);
  };
  for (int64_t i = 0; i < e.count; ++i) {
    const int8_t *w = e.w + i * e.block, *end = w + e.block_in / 4 * e.w_step;
    for (; w + kChains * e.w_step <= end; w += kChains * e.w_step)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add(sum[c], w + c * e.w_step);
    for (; w < end; w += e.w_step) add(sum[0], w);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) init[v] = (sum[0][v] + sum[1][v] + sum[2][v] + sum[3][v]) * -128;
}

template <class S>
size_t int8_scratch(const Product& p, int64_t rows) {
  return size_t(ceil_div(rows * padded_inputs(p), 64) * 64 + 4 * rows);  // panels, scales
}

template <class S, int V>
void product_int8_by(const Product& p, const Range& t, void* scratch) {
  constexpr int kStrip = V * kLanes32;
  const BlockMatrix& w = p.w;
  const int64_t inputs = padded_inputs(p), rows = t.row_end - t.row_begin;
  const int64_t depth = panel_depth(w);
  const Panels panels(rows, kWideRows);
  uint8_t* xs = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(xs + ceil_div(rows * inputs, 64) * 64);
  const S* x = static_cast<const S*>(p.x) + t.row_begin * p.ldx;
  const auto pack = [&](auto depth) {
    for (int64_t i = 0, at = 0; i < panels.count; ++i) {
      const int64_t height = panels.height + (i < panels.taller);
      quantise_rows<128>(x + at * p.ldx, p.ldx, height, p.in_features, inputs, depth,
                         xs + at * inputs, height, scales + at);
      at += height;
    }
  };
  depth == 32 ? pack(std::integral_constant<int64_t, 32>()) : pack(depth);
  // Whether y has to come from beyond L2; asking for lines that are there takes time.
  constexpr int64_t kNearBytes = 512 << 10;
  const int64_t outputs = (t.group_end - t.group_begin) * w.block_out;
  const bool far = rows * outputs * int64_t(sizeof(S)) > kNearBytes;
  const bool init_apart = panels.count > 1 || rows > kFewRows;
  const TileInt8<V> run_taller = tile_for<V>(panels.height + 1, depth, init_apart);
  const TileInt8<V> run_rest = tile_for<V>(panels.height, depth, init_apart);
  for (int64_t g = t.group_begin; g < t.group_end; ++g) {
    const int64_t begin = w.ptr[g];
    Entries8 e{w.index + begin, w.ptr[g + 1] - begin, nullptr, w.block_stride, w.in_stride,
               w.block_in};
    for (int64_t o = 0; o < w.block_out; o += kStrip) {
      const int64_t out = g * w.block_out + o;
      if (out >= p.out_features) break;
      const Int8Epilogue<S, V> epilogue(p, out);
      e.w = static_cast<const int8_t*>(w.values) + begin * w.block_stride + 4 * o;
      Ints init[V];
      if (init_apart) correction<V>(e, init);
      Scaling<V> by;
      for (int v = 0; v < V; ++v) {
        by.factor[v] = load(epilogue.factor + v * kLanes32);
        by.bias[v] = load(epilogue.bias + v * kLanes32);
      }
      for (int64_t i = 0, at = 0; i < panels.count; ++i) {
        const bool taller = i < panels.taller;
        const int64_t height = panels.height + taller, row = t.row_begin + at;
        if (far) {  // the next tile's lines: the panel below, or the first one of the next strip
          const S* y = epilogue.y(row);
          const S* ahead = i + 1 < panels.count ? y + height * p.ldy : y + kStrip - at * p.ldy;
          for (int64_t r = 0; r < height; ++r)
            for (int64_t c = 0; c < kStrip; c += 64 / int64_t(sizeof(S)))
              __builtin_prefetch(ahead + r * p.ldy + c, 1);
        }
        if (const S* residual = epilogue.residual(row))
          for (int64_t r = 0; r < height; ++r) __builtin_prefetch(residual + r * p.ldr);
        epilogue.write(row, height, [&](float* to, int64_t ldt) {
          (taller ? run_taller : run_rest)(e, xs + at * inputs, init, by, scales + at, to, ldt);
        });
        at += height;
      }
    }
  }
}

template <class S>
void product_int8(const Product& p, const Range& t, void* scratch) {
  if (p.w.block_out % (2 * kLanes32) == 0) return product_int8_by<S, 2>(p, t, scratch);
  product_int8_by<S, 1>(p, t, scratch);
}

RowSplit int8_rows(const Product& p) {
  constexpr int64_t kPanelBytes = 384 << 10, kLeast = 24, kMost = 288;
  return {1, std::max(kLeast, std::min(kMost, kPanelBytes / padded_inputs(p))), kLeast};
}

template <class S>
constexpr BlockSparseKernels int8_kernels() {
  return {int8_rows, int8_scratch<S>, product_int8<S>, nullptr, nullptr};
}

}  // namespace

const BlockSparseKernels LEAN_KERNELS_ISA::block_sparse_int8[kDtypes] = {
    int8_kernels<float>(), int8_kernels<BFloat16>(), int8_kernels<Float16>(), {}};

}  // namespace lean_kernels

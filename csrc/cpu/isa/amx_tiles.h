// SPDX-License-Identifier: Apache-2.0
// The tile registers of AMX. Instructions are written as text, since the file they are used in is
// compiled for AVX-512 alone; a compiler without AMX uses none of these registers itself.
#pragma once

#include "tiles.h"

namespace lean_kernels {
namespace {

constexpr int kTileRows = 16;   // also the columns of 4 bytes
constexpr int kTileBytes = 64;  // of a row

// Registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights, for the time of a task.
class TileRegisters {
 public:
  // `depth`: bytes of a row of x, as many as one product sums over; at most 64, a multiple of 4.
  explicit TileRegisters(int64_t depth) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = i == 4 || i == 5 ? uint16_t(depth) : kTileBytes;
      config.rows[i] = i >= 6 ? uint8_t(depth / 4) : kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

template <int t>
LK_INLINE void tile_load(const void* from, int64_t row_stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(row_stride), "i"(t)
               : "memory");
}
template <int t>
LK_INLINE void tile_store(void* to, int64_t row_stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(to), "r"(row_stride), "i"(t)
               : "memory");
}
template <int t>
LK_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(t));
}
// sums += x w: in float32 over pairs of bfloat16, or in int32 over fours of signed bytes.
template <class Sum, int sums, int x, int w>
LK_INLINE void tile_multiply() {
  if constexpr (__is_same(Sum, float)) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(w));
  } else {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(w));
  }
}

// Registers 0 to 3 as the sums of A panels of rows and B strips of 16 outputs: all rows start as
// init [16 B].
template <int A, int B, class Sum>
LK_INLINE void load_sums(const Sum* init) {
  tile_load<0>(init, 0);
  if constexpr (B == 2) tile_load<1>(init + kTileRows, 0);
  if constexpr (A == 2) tile_load<2>(init, 0);
  if constexpr (A == 2 && B == 2) tile_load<3>(init + kTileRows, 0);
}
// To rows of `ld` elements, panels `panel` elements apart.
template <int A, int B, class Sum>
LK_INLINE void store_sums(Sum* out, int64_t panel, int64_t ld) {
  const int64_t row = ld * int64_t(sizeof(Sum));
  tile_store<0>(out, row);
  if constexpr (B == 2) tile_store<1>(out + kTileRows, row);
  if constexpr (A == 2) tile_store<2>(out + panel, row);
  if constexpr (A == 2 && B == 2) tile_store<3>(out + panel + kTileRows, row);
}

// Of a product whose panels of x shall stay in L2, of 2 MiB; a second thread does not pay below the
// FLOP of the other.
constexpr int64_t kTilePanelBytes = 1 << 20;
constexpr double kTileSerialFlop = 8e6;

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Heights of register tiles, and how rows are cut into them.
#pragma once

#include "vec.h"

namespace lean_kernels {
namespace {

template <class T>
LK_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Register tiles: rows x vectors of accumulators, leaving room for operands in 16 or 32 registers.
#if defined(__AVX512F__)
constexpr int kWideRows = 12, kNarrowRows = 24;
#else
constexpr int kWideRows = 6, kNarrowRows = 12;
#endif

// Rows cut into panels of nearly equal height <= most, so that no panel is a thin remainder.
struct Panels {
  int64_t count, height, taller;  // the first `taller` panels have one row more than `height`
  Panels(int64_t rows, int64_t most)
      : count(ceil_div(rows, most)), height(rows / count), taller(rows % count) {}
};

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Part of isa_check, built with the flags of the instruction set: whole vectors must be stored as
// their elements are, bit for bit.
#include "../csrc/cpu/isa/vec.h"

namespace lean_kernels {
namespace {

template <class S>
int wrong() {
  constexpr int W = kLanes<float>;
  // Ties, their neighbours and all signs, exponents and NaN payloads, for 16 or 13 dropped bits.
  static constexpr uint32_t kLow[] = {0,      1,      0xfff,  0x1000, 0x1001, 0x2fff,
                                      0x3000, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff};
  int count = 0;
  float values[W];
  S together[W], alone[W];
  for (uint32_t low : kLow)
    for (uint32_t high = 0; high < 0x10000; high += W) {
      for (int i = 0; i < W; ++i) {
        const uint32_t bits = (high + i) << 16 | low;
        memcpy(values + i, &bits, 4);
        narrow(values[i], alone + i);
      }
      store_narrow(together, load(values));
      count += memcmp(together, alone, sizeof(alone)) != 0;
    }
  return count;
}

}  // namespace

int wrong_narrowings_bfloat16() { return wrong<BFloat16>(); }
int wrong_narrowings_float16() { return wrong<Float16>(); }
}  // namespace lean_kernels

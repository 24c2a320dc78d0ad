// SPDX-License-Identifier: Apache-2.0
#include "../isa.h"
#include "vec.h"

namespace lean_kernels {

// Multiply-adds on as many independent accumulators as hide their latency; returns the FLOP done.
double LEAN_KERNELS_ISA::fma_peak(int64_t iterations) {
  constexpr int kChains = 10;
  Vec<float> acc[kChains] = {}, scale = splat(0.999f);
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) {
      acc[c] = acc[c] * scale + scale;
#if defined(__AVX512F__)
      asm volatile("" : "+v"(acc[c]));
#elif defined(__x86_64__)
      asm volatile("" : "+x"(acc[c]));
#else
      asm volatile("" : "+w"(acc[c]));
#endif
    }
  return 2.0 * kChains * kLanes<float> * double(iterations);
}

}  // namespace lean_kernels

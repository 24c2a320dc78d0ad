// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <torch/csrc/stable/ops.h>

namespace lean_kernels {
namespace {

#define KERNELS(isa)             \
  {                              \
    #isa,                        \
    isa::add_layer_norm,         \
    isa::attention,              \
    isa::block_sparse,           \
    isa::block_sparse_int8,      \
    isa::lazy_adam,              \
    isa::low_rank,               \
    isa::ngram_bag,              \
    isa::selection,              \
    isa::tensor_product,         \
    isa::tensor_train,           \
    isa::fma_peak,               \
  }

const CpuKernels kGeneric = KERNELS(generic);
#if defined(__x86_64__)
const CpuKernels kAvx2 = KERNELS(avx2);

// The int8 kernels of AVX-512 need VNNI too.
CpuKernels avx512_kernels() {
  CpuKernels kernels = KERNELS(avx512);
  if (!__builtin_cpu_supports("avx512vnni")) kernels.block_sparse_int8 = avx2::block_sparse_int8;
  return kernels;
}

CpuKernels amx_kernels() {
  CpuKernels kernels = avx512_kernels();
  static BlockSparseKernels block_sparse[kDtypes];
  std::copy_n(kernels.block_sparse, int(kDtypes), block_sparse);
  static AttentionKernels attention[kDtypes];
  std::copy_n(kernels.attention, int(kDtypes), attention);
  attention[kBFloat16] = avx512::amx_attention_bfloat16;
  const auto replace = [&](Dtype dtype, const BlockSparseKernels& by) {
    block_sparse[dtype].product_rows = by.product_rows;
    block_sparse[dtype].product_scratch = by.product_scratch;
    block_sparse[dtype].product = by.product;
  };
  replace(kBFloat16, avx512::amx_block_sparse_bfloat16);
  replace(kFloat16, avx512::amx_block_sparse_float16);
  kernels.name = "amx";
  kernels.attention = attention;
  kernels.block_sparse = block_sparse;
  kernels.block_sparse_int8 = avx512::amx_block_sparse_int8;
  return kernels;
}

// Whether the processor has AMX for bfloat16 and int8, and Linux lets this process use its state.
bool amx_granted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // amx-bf16, amx-tile, amx-int8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const CpuKernels* kernels;
  bool present;
};

const CpuKernels& choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  static const CpuKernels kAvx512 = avx512_kernels(), kAmx = amx_kernels();
  const Candidate candidates[] = {{&kAmx, avx512 && amx_granted()},
                                  {&kAvx512, avx512},
                                  {&kAvx2, avx2},
                                  {&kGeneric, true}};
#else
  const Candidate candidates[] = {{&kGeneric, true}};
#endif
  const char* wanted = std::getenv("LEAN_KERNELS_CPU_ISA");
  std::string present;
  for (const Candidate& c : candidates) {
    if (!c.present) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, c.kernels->name)) return *c.kernels;
    present += std::string(present.empty() ? "" : ", ") + c.kernels->name;
  }
  throw std::runtime_error("LEAN_KERNELS_CPU_ISA=" + std::string(wanted) +
                           " is not available here; expected one of: " + present);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace lean_kernels

// Diagnostics for `lean-kernels info` and the benchmarks, called through ctypes.
extern "C" {

// Name of the instruction set in use; null when LEAN_KERNELS_CPU_ISA asks for a missing one.
__attribute__((visibility("default"))) const char* lean_kernels_cpu_isa() {
  try {
    return lean_kernels::cpu_kernels().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Multiply-add rate in FLOP/s of torch's current number of threads, over about `seconds`.
__attribute__((visibility("default"))) double lean_kernels_fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto* kernels = &lean_kernels::cpu_kernels();
  const int64_t threads = torch::stable::get_num_threads(), iterations = 1 << 16;
  double best = 0;
  const auto start = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    const auto begin = Clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t)
        for (int i = 0; i < 8; ++i) kernels->fma_peak(iterations);
    });
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    const double rate = 8 * double(threads) * kernels->fma_peak(1) * iterations / elapsed;
    if (rate > best) best = rate;
  }
  return best;
}
}

// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, one block after the other: each thread is a fiber that runs until it
// waits for its warp or block. The order of threads between two waits is drawn at random, so that a
// missing __syncthreads() shows. What only hardware has (memory order, occupancy) it cannot show.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)

struct Dim3 {
  int x = 1;
};
inline Dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

enum State { kReady, kAtWarp, kAtBlock, kDone };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
};
inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> slots;  // what each thread of a warp shows the others
inline ucontext_t scheduler;
inline int current;
inline const std::function<void()>* body;
inline std::mt19937 order(1);

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void enter() {
  (*body)();
  fibers[current].state = kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block(int threads) {
  constexpr size_t kStack = 64 << 10;
  fibers.resize(threads);
  slots.resize(threads);
  for (Fiber& f : fibers) {
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    f.state = kReady;
  }
  std::vector<int> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  const auto all = [&](int begin, int end, State state) {
    return std::all_of(fibers.begin() + begin, fibers.begin() + end,
                       [&](const Fiber& f) { return f.state == state || f.state == kDone; });
  };
  const auto release = [&](int begin, int end, State state) {
    bool any = false;
    for (int i = begin; i < end; ++i)
      if (fibers[i].state == state) fibers[i].state = kReady, any = true;
    return any;
  };
  for (;;) {
    std::shuffle(turn.begin(), turn.end(), order);
    const uint32_t paused = order() & order();  // warps that fall behind the others
    bool moved = false;
    for (int i : turn) {
      if (fibers[i].state != kReady) continue;
      moved = true;
      if (paused >> (i / 32) & 1) continue;
      current = threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (int w = 0; w < threads; w += 32)
      if (all(w, w + 32, kAtWarp)) moved |= release(w, w + 32, kAtWarp);
    if (!moved && all(0, threads, kAtBlock)) moved = release(0, threads, kAtBlock);
    if (all(0, threads, kDone)) return;
    if (!moved) {
      std::puts("deadlock: threads wait at different places");
      std::exit(1);
    }
  }
}

template <class F>
void launch(int blocks, int threads, const F& kernel) {
  const std::function<void()> function = kernel;
  body = &function;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    run_block(threads);
  }
}

// All threads of the warp show a value; then each reads.
template <class F>
auto exchange(uint64_t mine, const F& read) {
  const int me = current;
  slots[me] = mine;
  wait(kAtWarp);
  const auto result = read(me / 32 * 32, me % 32);
  wait(kAtWarp);
  return result;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::kAtBlock); }
inline uint32_t __ballot_sync(uint32_t, bool mine) {
  return emulator::exchange(mine, [](int warp, int) {
    uint32_t lanes = 0;
    for (int i = 0; i < 32; ++i) lanes |= uint32_t(emulator::slots[warp + i]) << i;
    return lanes;
  });
}
inline int __shfl_up_sync(uint32_t, int mine, int step) {
  return emulator::exchange(uint64_t(uint32_t(mine)), [&](int warp, int lane) {
    return int(uint32_t(emulator::slots[warp + (lane >= step ? lane - step : lane)]));
  });
}
template <class T>
T __shfl_xor_sync(uint32_t, T mine, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof(T));
  return emulator::exchange(bits, [&](int warp, int lane) {
    T other;
    std::memcpy(&other, &emulator::slots[warp + (lane ^ mask)], sizeof(T));
    return other;
  });
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int atomicAdd(int* at, int v) { return std::exchange(*at, *at + v); }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline int64_t __double_as_longlong(double v) {
  int64_t bits;
  std::memcpy(&bits, &v, 8);
  return bits;
}

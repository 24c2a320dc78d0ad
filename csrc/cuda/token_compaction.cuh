// SPDX-License-Identifier: Apache-2.0
// Kernels of select_tokens and gather_tokens. Two launches do all of it:
//   select_kernel   a block per sequence finds the kept tokens, listed where the sequence lies
//   compact_kernel  adds up the counts, closes the gaps, and moves the rows of every tensor
// No block waits for another, and nothing needs to be zeroed first, so that a CUDA graph of the two
// can be replayed. Also compiled for the CPU, by tests/cuda_emulator.h.
#pragma once

#include <cstdint>

namespace lean_kernels {

constexpr int kWarp = 32, kMostMoves = 8;
constexpr int kSelectThreads = 128, kMoveThreads = 256;
constexpr int kScanItems = 8;  // sequences a thread of compact_kernel adds up at a time
enum SelectMode { kFraction, kCounts, kThreshold };  // the position in op.MODES

struct Selection {
  const void* scores;      // [tokens]
  const int32_t* cu;       // [sequences + 1]
  const uint8_t* protect;  // [tokens], or null: the first of each sequence
  const int32_t* wanted;   // [sequences], mode kCounts
  int32_t* counts;         // [sequences] out
  int32_t* listed;         // [tokens] out: of each sequence, from its beginning on
  int64_t tokens;
  int32_t sequences;
  int mode;
  double value;
};

// A tensor whose rows are moved, in words of 1 << log_word bytes.
struct Move {
  const char* from;
  char* to;
  int64_t stride;  // bytes from row to row of `from`
  int64_t words;   // of a row
  int log_word;
};

struct Moves {
  Move move[kMostMoves];
  int count;
};

struct Compaction {
  const int32_t* cu;      // [sequences + 1]
  const int32_t* counts;  // [sequences]
  const int32_t* listed;  // [tokens]
  int64_t* indices;       // [total] out
  int32_t* cu_kept;       // [sequences + 1] out
  int64_t tokens, total;
  int32_t sequences;
};

struct alignas(16) Word16 {
  uint64_t a, b;
};

__device__ inline int64_t clamped(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// Unsigned integers in the order of the scores; 0 and -0 are equal, NaN is lowest, all protected
// ones above any number.
__device__ inline uint32_t order_key(float v) {
  if (v != v) return 0;
  const uint32_t bits = __float_as_uint(v + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t order_key(double v) {
  if (v != v) return 0;
  const uint64_t bits = uint64_t(__double_as_longlong(v + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

template <class S>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(Selection p) {
  using Key = decltype(order_key(S()));
  constexpr int kWarps = kSelectThreads / kWarp;
  __shared__ int histogram[256];
  __shared__ int guarded, digit, remaining;
  __shared__ int above_of[2][kWarps], tied_of[2][kWarps];
  const int b = blockIdx.x, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t begin = clamped(p.cu[b], 0, p.tokens);
  const int64_t end = clamped(p.cu[b + 1], begin, p.tokens);
  const S* scores = static_cast<const S*>(p.scores);
  const auto is_protected = [&](int64_t i) { return p.protect ? p.protect[i] != 0 : i == begin; };
  const auto key_of = [&](int64_t i) {
    return is_protected(i) ? Key(~Key(0)) : order_key(scores[i]);
  };

  int count = 0;
  Key bound = 0;  // keys above it are kept, and the first `ties` of those equal to it
  int ties = 0;
  if (p.mode != kThreshold) {
    if (thread == 0) guarded = 0;
    __syncthreads();
    int mine = 0;
    for (int64_t i = begin + thread; i < end; i += kSelectThreads) mine += is_protected(i);
    if (mine) atomicAdd(&guarded, mine);
    __syncthreads();
    const int length = int(end - begin);
    count = p.mode == kCounts ? p.wanted[b] : int(ceil(p.value * double(length) - 1e-6));
    count = int(clamped(count, p.mode == kCounts || length == 0 ? 0 : 1, length));
    count = count < guarded ? guarded : count;
    if (count > 0) {
      // Radix selection of the key of rank `count`, eight bits a pass.
      Key mask = 0;
      int rank = count;
      for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
        for (int i = thread; i < 256; i += kSelectThreads) histogram[i] = 0;
        __syncthreads();
        for (int64_t i = begin + thread; i < end; i += kSelectThreads) {
          const Key key = key_of(i);
          if ((key & mask) == bound) atomicAdd(&histogram[(key >> shift) & 255], 1);
        }
        __syncthreads();
        if (warp == 0) {
          // Lane l has the bins 255 - 8 l and the seven below.
          int bins[8], sum = 0;
#pragma unroll
          for (int k = 0; k < 8; ++k) sum += bins[k] = histogram[255 - 8 * lane - k];
          int before = sum;
          for (int step = 1; step < kWarp; step *= 2) {
            const int other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
          }
          before -= sum;
          if (before < rank && rank <= before + sum) {
#pragma unroll
            for (int k = 0; k < 8; ++k) {
              if (before < rank && rank <= before + bins[k]) {
                digit = 255 - 8 * lane - k;
                remaining = rank - before;
              }
              before += bins[k];
            }
          }
        }
        __syncthreads();
        bound |= Key(digit) << shift;
        mask |= Key(255) << shift;
        rank = remaining;
      }
      ties = rank;
    }
  }

  // In order: the tokens of a warp by its ballots, those of a block by its warps' sums.
  int above_before = 0, tied_before = 0, turn = 0;
  if (p.mode == kThreshold || count > 0) {
    for (int64_t base = begin; base < end; base += kSelectThreads, turn ^= 1) {
      const int64_t i = base + thread;
      bool above = false, tied = false;
      if (i < end) {
        if (p.mode == kThreshold) {
          above = is_protected(i) || scores[i] >= S(p.value);
        } else {
          const Key key = key_of(i);
          above = key > bound;
          tied = key == bound;
        }
      }
      const uint32_t above_lanes = __ballot_sync(~0u, above), tied_lanes = __ballot_sync(~0u, tied);
      if (lane == 0) {
        above_of[turn][warp] = __popc(above_lanes);
        tied_of[turn][warp] = __popc(tied_lanes);
      }
      __syncthreads();
      const uint32_t earlier = (1u << lane) - 1;
      int above_rank = above_before + __popc(above_lanes & earlier);
      int tied_rank = tied_before + __popc(tied_lanes & earlier);
      for (int w = 0; w < kWarps; ++w) {
        above_rank += w < warp ? above_of[turn][w] : 0;
        tied_rank += w < warp ? tied_of[turn][w] : 0;
        above_before += above_of[turn][w];
        tied_before += tied_of[turn][w];
      }
      if (above || (tied && tied_rank < ties))
        p.listed[begin + above_rank + (tied_rank < ties ? tied_rank : ties)] = int32_t(i);
    }
  }
  if (thread == 0) p.counts[b] = p.mode == kThreshold ? above_before : count;
}

// One warp moves a row, four words of each lane in flight; from null it writes zeros.
template <class Word>
__device__ inline void move_words(const char* from, char* to, int64_t words, int lane) {
  constexpr int kFlight = 4;
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  for (int64_t base = lane; base < words; base += kFlight * kWarp) {
    Word word[kFlight] = {};
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (source && base + k * kWarp < words) word[k] = source[base + k * kWarp];
#pragma unroll
    for (int k = 0; k < kFlight; ++k)
      if (base + k * kWarp < words) target[base + k * kWarp] = word[k];
  }
}

__device__ inline void move_rows(const Moves& moves, int64_t source, int64_t target, int lane) {
  for (int t = 0; t < moves.count; ++t) {
    const Move& m = moves.move[t];
    const char* from = source < 0 ? nullptr : m.from + source * m.stride;
    char* to = m.to + target * (m.words << m.log_word);
    switch (m.log_word) {
      case 4: move_words<Word16>(from, to, m.words, lane); break;
      case 3: move_words<uint64_t>(from, to, m.words, lane); break;
      case 2: move_words<uint32_t>(from, to, m.words, lane); break;
      case 1: move_words<uint16_t>(from, to, m.words, lane); break;
      default: move_words<uint8_t>(from, to, m.words, lane);
    }
  }
}

// Each block writes an equal share of the kept rows. All add up all counts: reading a few thousand
// integers costs less than waiting for whoever has added them up already.
__global__ void __launch_bounds__(kMoveThreads) compact_kernel(Compaction p, Moves moves) {
  constexpr int kWarps = kMoveThreads / kWarp, kTile = kMoveThreads * kScanItems;
  __shared__ int offsets[kTile + 1];
  __shared__ int sum_of[kWarps];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t first = p.total * blockIdx.x / gridDim.x;
  const int64_t last = p.total * (blockIdx.x + 1) / gridDim.x;
  int64_t place = 0;  // kept before the current tile of sequences
  for (int64_t tile = 0; tile < p.sequences; tile += kTile) {
    int items[kScanItems], sum = 0;
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      const int64_t b = tile + thread * kScanItems + k;
      items[k] = b < p.sequences ? p.counts[b] : 0;
      sum += items[k];
    }
    int before = sum;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    if (lane == kWarp - 1) sum_of[warp] = before;
    before -= sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) before += sum_of[w];
#pragma unroll
    for (int k = 0; k < kScanItems; ++k) {
      offsets[thread * kScanItems + k] = before;
      before += items[k];
    }
    if (thread == kMoveThreads - 1) offsets[kTile] = before;
    __syncthreads();

    if (blockIdx.x == 0)
      for (int64_t b = tile + thread; b < p.sequences && b < tile + kTile; b += kMoveThreads)
        p.cu_kept[b] = int32_t(clamped(place + offsets[b - tile], 0, p.total));
    const int64_t stop = clamped(place + offsets[kTile], 0, last);
    for (int64_t row = (place < first ? first : place) + warp; row < stop; row += kWarps) {
      const int within = int(row - place);
      int low = 0, high = kTile;  // offsets[low] <= within < offsets[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= within) {
          low = middle;
        } else {
          high = middle;
        }
      }
      const int64_t begin = clamped(p.cu[tile + low], 0, p.tokens);
      const int64_t index = p.listed[begin + within - offsets[low]];
      if (lane == 0) p.indices[row] = index;
      move_rows(moves, index, row, lane);
    }
    place += offsets[kTile];
    if (blockIdx.x != 0 && place >= last) return;
  }
  if (blockIdx.x == 0 && thread == 0)
    p.cu_kept[p.sequences] = int32_t(clamped(place, 0, p.total));
  // Fewer were kept than the caller said.
  for (int64_t row = (place < first ? first : place) + warp; row < last; row += kWarps) {
    if (lane == 0) p.indices[row] = -1;
    move_rows(moves, -1, row, lane);
  }
}

__global__ void __launch_bounds__(kMoveThreads)
    gather_kernel(const int64_t* indices, int64_t rows, int64_t tokens, Moves moves) {
  constexpr int kWarps = kMoveThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < rows;
       row += int64_t(gridDim.x) * kWarps) {
    const int64_t index = indices[row];
    move_rows(moves, index >= 0 && index < tokens ? index : -1, row, lane);
  }
}

}  // namespace lean_kernels

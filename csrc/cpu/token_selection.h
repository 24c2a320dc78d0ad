// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of select_tokens take, for one type of scores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean_kernels {

struct TokenScores {
  const void* scores;      // [T]
  const uint8_t* protect;  // [T] bools; null: the first token of each sequence
};

struct SelectionKernels {
  // Bytes of scratch for a sequence of that many tokens.
  size_t (*scratch)(int64_t length);
  // Writes the numbers of the `count` best of tokens [begin, end), in order. At least the protected
  // ones must fit.
  void (*best)(const TokenScores&, int64_t begin, int64_t end, int64_t count, int64_t* out,
               void* scratch);
  // The number of tokens that are protected or score at least `threshold`; their numbers, in order.
  int64_t (*count_above)(const TokenScores&, int64_t begin, int64_t end, double threshold);
  void (*above)(const TokenScores&, int64_t begin, int64_t end, double threshold, int64_t* out);
};

}  // namespace lean_kernels

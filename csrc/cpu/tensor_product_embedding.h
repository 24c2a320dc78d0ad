// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of tensor_product_embedding take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "embedding_row.h"

namespace lean_kernels {

constexpr int kMostOrder = 4;

// The table. An element of a row has a digit a_k < used[k] in each factor k; flat, it is
// (..(a_0 * used[1] + a_1)..) * used[order - 1] + a_(order - 1).
struct TensorProduct {
  const void* morphemes;  // [V, order]
  int morpheme_bytes;     // 2, 4 or 8, signed
  const void* factors;    // [count, rank, size]
  int64_t count, rank, size;
  int64_t features;
  int order;
  int64_t used[kMostOrder];       // all `size` digits, unless features end before
  int64_t width[kMostOrder + 1];  // product of used[k] and those after it

  // False if an index lies outside [0, count).
  bool morphemes_of(int64_t id, int64_t (&index)[kMostOrder]) const {
    uint64_t largest = 0;  // a negative index becomes a huge one
    for (int k = 0; k < order; ++k) {
      const int64_t at = id * order + k;
      index[k] = morpheme_bytes == 8   ? static_cast<const int64_t*>(morphemes)[at]
                 : morpheme_bytes == 4 ? static_cast<const int32_t*>(morphemes)[at]
                                       : static_cast<const int16_t*>(morphemes)[at];
      largest = uint64_t(index[k]) > largest ? uint64_t(index[k]) : largest;
    }
    return largest < uint64_t(count);
  }
};

// What the gradient of pieces goes to; all in accumulators.
struct TensorProductGrads {
  const void* grad;          // [positions, features], contiguous, in the factors' dtype
  const uint32_t* positions; // listed
  void* shares;              // [pieces, order, rank, size] out: gradients of each piece's factors
  void* weight;              // [2, features] summed up: the gradients of the norm's weight and bias
  void* rows;                // [listed, features] out: the gradient before the norm; or null
  uint32_t first;            // of the list, in `rows`
};

// Each returns false at a morpheme that lies outside the factors.
struct TensorProductKernels {
  // Bytes of scratch of either kernel.
  size_t (*scratch)(const TensorProduct&);
  bool (*rows)(const TensorProduct&, const EmbeddingRows&, const Piece*, int64_t count,
               const uint32_t* positions, void* scratch);
  bool (*grads)(const TensorProduct&, const EmbeddingRows&, const TensorProductGrads&,
                const Piece*, int64_t count, void* scratch);
  // to[0:length] += the sum of from[positions[i] * length + ...] for i < count, in accumulators.
  void (*add_rows)(const void* from, const uint32_t* positions, int64_t count, int64_t stride,
                   int64_t length, void* to);
};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of low_rank_embedding take.
#pragma once

#include <cstddef>

#include "embedding_row.h"

namespace lean_kernels {

// Rows activation(codes[id] decoderᵀ + bias), one for each group of places with the same id.
struct LowRank {
  const void* codes;    // [*, rank], unit stride within a row; int8 with scales
  const float* scales;  // of each row of codes, or null
  const void* decoder;  // [features, rank]
  const void* bias;     // [features] or null
  int64_t code_stride, decoder_out, decoder_in;  // elements
  int64_t features, rank;
  int activation;        // as in isa/activations.h
  const int64_t* ids;    // of each group
  const int64_t* first;  // of each group: its first place; null: the groups are the places
  const int64_t* next;   // of each place: the next of its group, or -1
};

// What the gradient takes besides. Accumulators are float32, or float64 for float64.
struct LowRankGrad {
  const void* grad;  // [places, features], unit stride within a row
  int64_t grad_stride;
  const int64_t* count;     // of each distinct id, to divide its gradient by; or null
  const int32_t* distinct;  // of each group: the number of its id
  void* codes;              // [groups, padded rank] accumulators; null: not needed
};

// In elements of accumulators.
struct LowRankSizes {
  int64_t strips;       // the decoder is packed in
  int64_t padded_rank;  // of gradients
  int64_t made_stride;  // from row to row of scratch
  size_t packed, grad_packed;
  size_t row_scratch, grad_row_scratch, slack;  // scratch: of each group, and once
  int64_t panel_rows;                           // of a register tile
};

struct LowRankKernels {
  LowRankSizes (*sizes)(const LowRank&);
  // The decoder in the order of `rows` and, with an activation, of `grad`: strips [begin, end).
  void (*pack)(const LowRank&, int64_t begin, int64_t end, void* packed);
  void (*grad_pack)(const LowRank&, void* packed);
  // Makes the rows of groups [begin, end) and writes each to all its places.
  void (*rows)(const LowRank&, const EmbeddingRows&, const void* packed, int64_t begin,
               int64_t end, void* scratch);
  // Adds what groups [begin, end) contribute to `decoder` [features, padded rank] and `bias`
  // [made_stride], accumulators, null where not needed.
  void (*grad)(const LowRank&, const LowRankGrad&, const void* packed, const void* grad_packed,
               int64_t begin, int64_t end, void* decoder, void* bias, void* scratch);
  void (*add)(void* to, const void* from, int64_t count);  // accumulators
  // to [rows, cols] = the sum of `count` blocks of accumulators [rows, stride].
  void (*sum)(const void* blocks, int64_t count, int64_t stride, int64_t rows, int64_t cols,
              void* to);
};

}  // namespace lean_kernels

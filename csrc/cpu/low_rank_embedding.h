// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of low_rank_embedding take.
#pragma once

#include <cstddef>

#include "embedding_row.h"

namespace lean_kernels {

// Rows activation(codes[id] decoderᵀ + bias), one for each piece, written to all its positions.
struct LowRank {
  const void* codes;    // [*, rank], unit stride within a row; int8 with scales
  const float* scales;  // of each row of codes, or null
  const void* decoder;  // [features, rank]
  const void* bias;     // [features] or null
  int64_t code_stride, decoder_out, decoder_in;  // elements
  int64_t features, rank;
  int activation;  // as in isa/activations.h
  const Piece* pieces;
  const uint32_t* positions;  // listed by pieces; null: each piece has the one it begins at
};

// What the gradient takes besides. Accumulators are float32, or float64 for float64.
struct LowRankGrad {
  const void* grad;  // [positions, features], unit stride within a row
  int64_t grad_stride;
  const uint32_t* count;  // of positions of each piece's id, to divide its gradient by; or null
  void* codes;            // [pieces, padded rank] accumulators; null: not needed
};

constexpr int64_t kLogitStrips = 8;

// Logits x codesᵀ + bias + shift over a vocabulary.
struct LowRankLogits {
  const void* codes;    // [vocabulary, rank], as in LowRank
  const float* scales;  // as in LowRank
  const void* x;        // [rows, rank], unit stride within a row
  const void* bias;     // [vocabulary] or null
  const void* shift;    // [rows] or null
  void* out;            // [rows, vocabulary]
  int64_t vocabulary, rank, code_stride, rows, x_stride;
  int64_t group;  // words multiplied by all rows before the next: strips, at most kLogitStrips

  int64_t depth() const { return rank + (shift != nullptr); }
};

// In elements of accumulators.
struct LowRankSizes {
  int64_t strips;       // the decoder is packed in
  int64_t padded_rank;  // of gradients of codes
  int64_t made_stride;  // from row to row of scratch
  size_t packed, grad_packed;
  // Scratch: of each piece, of each of its positions (`rows` alone), and once.
  size_t row_scratch, grad_row_scratch, position_scratch, slack;
  int64_t panel_rows;                           // of a register tile
};

struct LowRankKernels {
  LowRankSizes (*sizes)(const LowRank&);
  // The decoder in the order of `rows` and, with an activation, of `grad`: strips [begin, end).
  void (*pack)(const LowRank&, int64_t begin, int64_t end, void* packed);
  void (*grad_pack)(const LowRank&, void* packed);
  // Makes the rows of pieces [begin, end) and writes each to all its positions.
  void (*rows)(const LowRank&, const EmbeddingRows&, const void* packed, int64_t begin,
               int64_t end, void* scratch);
  // What pieces [begin, end) contribute to `decoder` [rank, made_stride] and `bias` [made_stride],
  // accumulators, null where not needed; `adds` keeps what they hold. Pieces [end, next) are next.
  void (*grad)(const LowRank&, const LowRankGrad&, const void* packed, const void* grad_packed,
               int64_t begin, int64_t end, int64_t next, bool adds, void* decoder, void* bias,
               void* scratch);
  // to [cols] = the sum of `count` rows of accumulators, `stride` apart.
  void (*sum)(const void* rows, int64_t count, int64_t stride, int64_t cols, void* to);
  // Features [begin, end) of to [features, rank] = the sum of `count` of what `grad` makes.
  void (*sum_decoders)(const LowRank&, const void* decoders, int64_t count, int64_t begin,
                       int64_t end, void* to);
  int64_t strip;  // words of a register tile
  // x and shift in the order of `logits`, padded by a vector.
  void (*pack_x)(const LowRankLogits&, void* packed);
  // Columns [begin, end) of out; scratch for a group's codes, padded by a vector.
  void (*logits)(const LowRankLogits&, const void* packed, int64_t begin, int64_t end,
                 void* scratch);
};

}  // namespace lean_kernels

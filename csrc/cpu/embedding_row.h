// SPDX-License-Identifier: Apache-2.0
// What follows the making of an embedding's row, for every op that makes them: rows of small tables
// added, the sum normalised, and written out.
#pragma once

#include <cstdint>

namespace lean_kernels {

struct AddedTable {
  const void* ids;    // of every row of the output; null: no table
  const void* table;  // [*, features]
  int64_t stride;     // elements from row to row
  bool wide_ids;      // int64, else int32

  int64_t row(int64_t i) const {
    return wide_ids ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
  }
};

// Some of the positions of an id: those at begin to end of a list.
struct Piece {
  int64_t id;
  uint32_t begin, end;
};

enum RowNorm { kNoNorm, kLayerNorm, kRmsNorm };

struct EmbeddingRows {
  AddedTable added[2];
  int norm;
  const void* weight;  // [features] or null; float32, or float64 for float64 rows
  const void* bias;    // like weight
  double eps;
  int64_t features;
  void* out;       // [rows, features]
  int64_t stride;  // elements from row to row of out
  bool stream;     // past the caches: out is large, and its rows are whole cache lines

  // Rows are written as they are made.
  bool plain() const { return norm == kNoNorm && !added[0].ids && !added[1].ids; }
};

}  // namespace lean_kernels

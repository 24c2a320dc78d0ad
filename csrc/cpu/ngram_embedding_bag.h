// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of ngram_embedding_bag take.
#pragma once

#include <cstdint>

namespace lean_kernels {

// A list of rows of a matrix. Forward these are rows of the table, backward those of the gradient.
struct NgramRows {
  const void* source;
  int64_t ld;            // elements from row to row
  int64_t features;
  const int64_t* index;  // the rows of the list
  const void* weights;   // one per entry of the list, or null; accumulators
  const float* scales;   // one per row of the matrix, or null
  int64_t skip;          // a row to leave out, or -1
};

// `sums` and `weights` are float32, or float64 for float64 rows.
struct NgramBagKernels {
  // sums = the weighted sum of the entries [begin, end).
  void (*sum)(const NgramRows&, int64_t begin, int64_t end, void* sums);
  // out = sums * factor, in the rows' dtype (float32 for int8).
  void (*write)(const void* sums, double factor, int64_t features, void* out);
  // out[i] = factor * the product of entry i and `other`, a row in the dtype that write gives.
  void (*dot)(const NgramRows&, int64_t begin, int64_t end, const void* other, double factor,
              void* out);
};

}  // namespace lean_kernels

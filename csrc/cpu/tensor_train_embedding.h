// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of tensor_train_embedding take.
#pragma once

#include <cstdint>

namespace lean_kernels {

constexpr int kMostCores = 4;

// Row (i_1 ... i_K) is the product of the slices cores[k][i_k], [ranks[k], cols[k] ranks[k + 1]],
// i_1 and the first column the most significant. Cores are accumulators: float32, or float64.
struct TensorTrain {
  int order;                      // K
  int64_t rows[kMostCores];       // v_k
  int64_t cols[kMostCores];       // d_k
  int64_t ranks[kMostCores + 1];  // of which the first and last are 1
  const void* cores[kMostCores];
  const void* transposed[kMostCores];  // slices [cols[k] ranks[k + 1], ranks[k]]; backward only
  int64_t features;               // columns that are kept
};

// Rows that occur, in rising order, and where: row i at places[starts[i]] to [starts[i + 1]] - 1.
struct Wanted {
  const int64_t* rows;
  const int64_t* starts;
  const int64_t* places;
};

struct TensorTrainKernels {
  int64_t (*scratch)(const TensorTrain&);  // bytes, of either
  // Writes the wanted rows [begin, end) to their places in out [N, features].
  void (*forward)(const TensorTrain&, const Wanted&, int64_t begin, int64_t end, void* out,
                  void* scratch);
  // Adds to grads[k], like cores[k], what the wanted rows [begin, end) give of grad [N, features].
  void (*backward)(const TensorTrain&, const Wanted&, int64_t begin, int64_t end, const void* grad,
                   bool by_frequency, void* const* grads, void* scratch);
};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// tensor_train_embedding of one instruction set. Rows come in rising order, so those that begin
// with the same indices follow one another: each product of leading cores is made once and stays in
// L1 while they pass. Backward goes down the same stack, and each product's gradient is complete
// before it is passed on.
#include "../isa.h"

#include <algorithm>

#include "../tensor_train_embedding.h"
#include "vec.h"

namespace lean_kernels {
namespace {

constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;

// c[rows, cols] (+)= a b. a's element (i, k) is at a[i * ai + k * ak]; b and c are dense rows.
template <class A>
struct Product {
  const A* a;
  int64_t ai, ak;
  const A* b;
  A* c;
  int64_t rows, cols, inner;
  bool add;
};

template <int rows, int vectors, class A>
LK_INLINE void tile(const Product<A>& p, int64_t i, const A* b, int64_t ldb, A* c, int64_t ldc,
                    bool add) {
  constexpr int W = kLanes<A>;
  Vec<A> sum[rows][vectors] = {};
  const A* a = p.a + i * p.ai;
  for (int64_t k = 0; k < p.inner; ++k) {
    Vec<A> factor[vectors];
    for (int v = 0; v < vectors; ++v) factor[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<A> left = splat(a[r * p.ai + k * p.ak]);
      for (int v = 0; v < vectors; ++v) sum[r][v] += left * factor[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      A* to = c + r * ldc + v * W;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// All rows of one or two vectors of columns.
template <int vectors, class A>
LK_INLINE void column(const Product<A>& p, const A* b, int64_t ldb, A* c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= p.rows; i += kTileRows)
    tile<kTileRows, vectors>(p, i, b, ldb, c + i * ldc, ldc, add);
  for (; i + 2 <= p.rows; i += 2) tile<2, vectors>(p, i, b, ldb, c + i * ldc, ldc, add);
  for (; i < p.rows; ++i) tile<1, vectors>(p, i, b, ldb, c + i * ldc, ldc, add);
}

// `edge` holds (inner + rows) vectors, for the columns that fill none.
template <class A>
void multiply(const Product<A>& p, A* edge) {
  constexpr int W = kLanes<A>;
  int64_t j = 0;
  for (; j + 2 * W <= p.cols; j += 2 * W) column<2>(p, p.b + j, p.cols, p.c + j, p.cols, p.add);
  for (; j + W <= p.cols; j += W) column<1>(p, p.b + j, p.cols, p.c + j, p.cols, p.add);
  const int64_t left = p.cols - j;
  if (left == 0) return;
  A* sums = edge + p.inner * W;
  for (int64_t k = 0; k < p.inner; ++k) {
    for (int64_t w = 0; w < left; ++w) edge[k * W + w] = p.b[k * p.cols + j + w];
    for (int64_t w = left; w < W; ++w) edge[k * W + w] = 0;
  }
  column<1>(p, edge, W, sums, W, false);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t w = 0; w < left; ++w) {
      A* to = p.c + i * p.cols + j + w;
      *to = p.add ? *to + sums[i * W + w] : sums[i * W + w];
    }
}

// The products of the leading cores of one row, and their gradients.
template <class A>
class Stack {
 public:
  Stack(const TensorTrain& tt, void* scratch) : tt_(tt) {
    A* at = static_cast<A*>(scratch);
    height_[0] = 1;
    for (int k = 0; k < tt.order; ++k) {
      height_[k + 1] = height_[k] * tt.cols[k];
      slice_[k] = tt.ranks[k] * tt.cols[k] * tt.ranks[k + 1];
      product_[k] = k == 0 ? nullptr : at;
      if (k > 0) at += padded(size(k));
      grad_[k] = at;
      at += padded(size(k));
      index_[k] = -1;
    }
    edge_ = at;
  }

  static int64_t bytes(const TensorTrain& tt) {
    int64_t total = 0, height = 1, most = 0;
    for (int k = 0; k < tt.order; ++k) {
      most = std::max(most, height + tt.ranks[k] + tt.cols[k] * tt.ranks[k + 1]);
      height *= tt.cols[k];
      total += 2 * padded(height * tt.ranks[k + 1]);
    }
    return (total + most * kLanes<A>) * int64_t(sizeof(A));
  }

  int64_t size(int k) const { return height_[k + 1] * tt_.ranks[k + 1]; }
  const A* row() const { return product_[tt_.order - 1]; }
  A* row_grad() const { return grad_[tt_.order - 1]; }

  // The first core whose index differs from the last row's, and from there on the new indices.
  int move_to(int64_t row, int64_t (&index)[kMostCores]) const {
    for (int k = tt_.order - 1; k >= 0; --k) {
      index[k] = row % tt_.rows[k];
      row /= tt_.rows[k];
    }
    int k = 0;
    while (k < tt_.order && index[k] == index_[k]) ++k;
    return k;
  }

  void make(int from, const int64_t (&index)[kMostCores]) {
    for (int k = from; k < tt_.order; ++k) {
      index_[k] = index[k];
      const A* core = static_cast<const A*>(tt_.cores[k]) + index[k] * slice_[k];
      if (k == 0) {
        product_[0] = const_cast<A*>(core);
        continue;
      }
      const int64_t rank = tt_.ranks[k];
      multiply<A>({product_[k - 1], rank, 1, core, product_[k], height_[k],
                   tt_.cols[k] * tt_.ranks[k + 1], rank, false},
                  edge_);
    }
  }

  void clear_grads(int from) {
    for (int k = from; k < tt_.order; ++k) memset(grad_[k], 0, size(k) * sizeof(A));
  }

  // Passes on the gradients of the products number `from` down to `to`, which are complete.
  void pass_on(int from, int to, void* const* grads) {
    for (int k = from; k >= to; --k) {
      A* core_grad = static_cast<A*>(grads[k]) + index_[k] * slice_[k];
      if (k == 0) {
        for (int64_t i = 0; i < slice_[0]; ++i) core_grad[i] += grad_[0][i];
        return;
      }
      const int64_t rank = tt_.ranks[k], width = tt_.cols[k] * tt_.ranks[k + 1];
      multiply<A>({product_[k - 1], 1, rank, grad_[k], core_grad, rank, width, height_[k], true},
                  edge_);
      const A* core = static_cast<const A*>(tt_.transposed[k]) + index_[k] * slice_[k];
      multiply<A>({grad_[k], width, 1, core, grad_[k - 1], height_[k], rank, width, true}, edge_);
    }
  }

 private:
  static int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }

  const TensorTrain& tt_;
  int64_t height_[kMostCores + 1];  // columns of a product
  int64_t slice_[kMostCores];
  A* product_[kMostCores];  // [height, rank]
  A* grad_[kMostCores];
  int64_t index_[kMostCores];
  A* edge_;
};

template <class S>
void write_row(const typename Accumulator<S>::type* row, int64_t features, S* out) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  int64_t d = 0;
  for (; d + W <= features; d += W) store_narrow(out + d, load(row + d));
  for (; d < features; ++d) narrow(row[d], out + d);
}

template <class S>
void forward(const TensorTrain& tt, const Wanted& wanted, int64_t begin, int64_t end, void* out_,
             void* scratch) {
  using A = typename Accumulator<S>::type;
  Stack<A> stack(tt, scratch);
  S* out = static_cast<S*>(out_);
  int64_t index[kMostCores];
  for (int64_t i = begin; i < end; ++i) {
    stack.make(stack.move_to(wanted.rows[i], index), index);
    for (int64_t at = wanted.starts[i]; at < wanted.starts[i + 1]; ++at)
      write_row(stack.row(), tt.features, out + wanted.places[at] * tt.features);
  }
}

template <class S>
void backward(const TensorTrain& tt, const Wanted& wanted, int64_t begin, int64_t end,
              const void* grad_, bool by_frequency, void* const* grads, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  Stack<A> stack(tt, scratch);
  const S* grad = static_cast<const S*>(grad_);
  const int last = tt.order - 1;
  int64_t index[kMostCores];
  for (int64_t i = begin; i < end; ++i) {
    const int from = stack.move_to(wanted.rows[i], index);
    if (i > begin) stack.pass_on(last - 1, from, grads);
    stack.make(from, index);
    stack.clear_grads(from);
    A* sum = stack.row_grad();
    const int64_t first = wanted.starts[i], stop = wanted.starts[i + 1];
    for (int64_t at = first; at < stop; ++at) {
      const S* row = grad + wanted.places[at] * tt.features;
      int64_t d = 0;
      for (; d + W <= tt.features; d += W) store(sum + d, load(sum + d) + load_wide(row + d));
      for (; d < tt.features; ++d) sum[d] += A(widen(row[d]));
    }
    if (by_frequency)
      for (int64_t d = 0; d < tt.features; ++d) sum[d] /= A(stop - first);
    stack.pass_on(last, last, grads);
  }
  if (begin < end) stack.pass_on(last - 1, 0, grads);
}

template <class S>
constexpr TensorTrainKernels kKernels{Stack<typename Accumulator<S>::type>::bytes, forward<S>,
                                      backward<S>};

}  // namespace

const TensorTrainKernels LEAN_KERNELS_ISA::tensor_train[kDtypes] = {
    kKernels<float>, kKernels<BFloat16>, kKernels<Float16>, kKernels<double>};

}  // namespace lean_kernels

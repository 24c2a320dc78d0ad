// SPDX-License-Identifier: Apache-2.0
// block_sparse_linear and its gradients on CPU: tensors in, tasks out to torch's thread pool.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"
#include "isa.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "block_sparse_linear";
// Larger weights are not real, and could overflow the sizes computed from them.
constexpr int64_t kMostBlock = 1 << 16, kMostElements = int64_t(1) << 46;
constexpr int64_t kMostBlockColumns = 0x7fffffff;  // what int32 indices can name
constexpr int64_t kMostInt8Inputs = 1 << 16;  // 255 * 128 times that fits int32

// Indices of a pattern. Checked on every call: it is cheap, and no kernel can then leave its
// bounds.
struct Pattern {
  Tensor crow, col;
  const int32_t *ptr, *index;
  int64_t groups, nnz, most = 0;

  Pattern(const Tensor& crow_indices, const Tensor& col_indices, int64_t block_rows,
          int64_t block_cols)
      : crow(crow_indices), col(col_indices) {
    STD_TORCH_CHECK(crow.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int,
                    "block_sparse_linear: crow_indices and col_indices must be int32");
    STD_TORCH_CHECK(crow.dim() == 1 && col.dim() == 1 && crow.size(0) == block_rows + 1,
                    "block_sparse_linear: crow_indices must be [", block_rows + 1,
                    "] and col_indices [nnz]");
    if (!crow.is_contiguous()) crow = torch::stable::contiguous(crow);
    if (!col.is_contiguous()) col = torch::stable::contiguous(col);
    ptr = static_cast<const int32_t*>(crow.const_data_ptr());
    index = static_cast<const int32_t*>(col.const_data_ptr());
    groups = block_rows;
    nnz = col.size(0);
    bool rises = ptr[0] == 0 && ptr[groups] == nnz;
    for (int64_t g = 0; g < groups; ++g) {
      rises &= ptr[g] <= ptr[g + 1];
      most = std::max<int64_t>(most, int64_t(ptr[g + 1]) - ptr[g]);
    }
    STD_TORCH_CHECK(rises, "block_sparse_linear: crow_indices must rise from 0 to nnz = ", nnz);
    uint32_t largest = 0;  // a negative index becomes a huge one
    for (int64_t e = 0; e < nnz; ++e) largest = std::max(largest, uint32_t(index[e]));
    STD_TORCH_CHECK(nnz == 0 || int64_t(largest) < block_cols,
                    "block_sparse_linear: col_indices must lie in [0, ", block_cols, ")");
  }
};

BlockMatrix block_matrix(const Tensor& weight, const Pattern& pattern) {
  return {weight.const_data_ptr(), pattern.ptr,      pattern.index,    nullptr,
          pattern.groups,          weight.size(1),   weight.size(2),   weight.stride(0),
          weight.stride(1),        weight.stride(2)};
}

// Wᵀ, its pattern by counting sort: entries of each block column in row order.
struct Transposed {
  std::vector<int32_t> ptr, index, position;
  int64_t most = 0;
  BlockMatrix matrix;

  Transposed(const Pattern& pattern, const Tensor& weight, int64_t block_cols)
      : ptr(block_cols + 1), index(pattern.nnz), position(pattern.nnz) {
    for (int64_t e = 0; e < pattern.nnz; ++e) ++ptr[pattern.index[e] + 1];
    for (int64_t c = 0; c < block_cols; ++c) {
      most = std::max<int64_t>(most, ptr[c + 1]);
      ptr[c + 1] += ptr[c];
    }
    std::vector<int32_t> next(ptr.begin(), ptr.end() - 1);
    for (int64_t g = 0; g < pattern.groups; ++g)
      for (int32_t e = pattern.ptr[g]; e < pattern.ptr[g + 1]; ++e) {
        const int32_t at = next[pattern.index[e]]++;
        index[at] = int32_t(g);
        position[at] = e;
      }
    matrix = {weight.const_data_ptr(), ptr.data(),     index.data(),     position.data(),
              block_cols,              weight.size(2), weight.size(1),   weight.stride(0),
              weight.stride(2),        weight.stride(1)};
  }
};

void check_blocks(int64_t nnz, int64_t block_out, int64_t block_in) {
  STD_TORCH_CHECK(block_out > 0 && block_in > 0 && block_out <= kMostBlock &&
                      block_in <= kMostBlock && nnz <= kMostElements / (block_out * block_in),
                  "block_sparse_linear: block sizes must lie in [1, ", kMostBlock,
                  "] and the weight hold at most 2^46 elements, got ", nnz, " blocks of ",
                  block_out, "x", block_in);
}

void check_weight(const Tensor& weight, const Tensor& x, const Tensor& col) {
  STD_TORCH_CHECK(weight.dim() == 3 && col.dim() == 1 && weight.size(0) == col.size(0),
                  "block_sparse_linear: weight must be [nnz, block_out, block_in] with nnz as in "
                  "col_indices");
  check_blocks(weight.size(0), weight.size(1), weight.size(2));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(),
                  "block_sparse_linear: x and weight must have the same dtype, got ",
                  toString(x.scalar_type()), " and ", toString(weight.scalar_type()),
                  "; convert one with .to()");
}

// First group of part `i` of `parts`, parts holding about equal work: entries, and a little for
// each group's epilogue.
int64_t split_groups(const BlockMatrix& w, int64_t i, int64_t parts) {
  const auto work = [&](int64_t g) { return w.ptr[g] * w.block_in + 16 * g; };
  const int64_t target = work(w.groups) * i / parts;
  int64_t low = 0, high = w.groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && target - work(low - 1) < work(low) - target ? low - 1 : low;
}

// Threads for work counted in what two threads are worth from on.
int64_t threads_for(double work) {
  if (work < 1) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), int64_t(2 * work));
}

// A product, and the tasks it is cut into.
class ProductTasks {
 public:
  ProductTasks(const Product& product, const BlockSparseKernels& kernels)
      : p_(product), kernels_(kernels), split_(kernels.product_rows(p_)) {
    const int64_t weights = p_.w.ptr[p_.w.groups] * p_.w.block_in * p_.w.block_out;
    work_ = (2.0 * std::max<int64_t>(p_.rows, split_.per_weight) * weights +
             16.0 * p_.rows * p_.out_features) /
            split_.serial;
  }

  double work() const { return work_; }

  // How many tasks, for so many threads.
  int64_t cut(int64_t threads) {
    if (p_.rows == 0) return 0;
    units_ = ceil_div(p_.rows, split_.unit);
    chunks_ = ceil_div(p_.rows, split_.most / split_.unit * split_.unit);
    if (chunks_ > threads) {
      chunks_ = std::min(units_, ceil_div(chunks_, threads) * threads);
    } else {
      chunks_ = std::max(chunks_, std::min({threads, units_, p_.rows / split_.least}));
    }
    splits_ = std::min(p_.w.groups, ceil_div(threads, chunks_));
    return chunks_ * splits_;
  }

  void run(int64_t task) const {
    const int64_t chunk = task / splits_, part = task % splits_;
    const Range range{row_at(chunk), row_at(chunk + 1), split_groups(p_.w, part, splits_),
                      split_groups(p_.w, part + 1, splits_)};
    if (range.row_begin == range.row_end || range.group_begin == range.group_end) return;
    const int64_t rows = range.row_end - range.row_begin;
    kernels_.product(p_, range, thread_scratch(kernels_.product_scratch(p_, rows)));
  }

 private:
  int64_t row_at(int64_t chunk) const {
    return std::min(p_.rows, units_ * chunk / chunks_ * split_.unit);
  }

  const Product p_;
  const BlockSparseKernels& kernels_;
  const RowSplit split_;
  double work_;
  int64_t units_ = 0, chunks_ = 0, splits_ = 0;
};

// Not stable::new_empty, which finds the operator by its name on each call.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int32_t dtype_code(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// [..., features] like x [..., cols], contiguous.
Tensor output_like(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = features;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1))
    strides[d] = stride;
  return empty_strided(sizes, strides, dtype_code(x));
}

// activation(x Wᵀ + bias) + residual; what differs by the kind of weight is in `matrix` and
// `scales`.
Tensor multiply(const Tensor& x, const Pattern& pattern, const BlockMatrix& matrix,
                const float* scales, std::optional<Tensor> bias, std::optional<Tensor> residual,
                int64_t out_features, int64_t activation, const BlockSparseKernels& kernels) {
  const Rows in(x, kOp);
  Tensor y = output_like(x, out_features);
  Product p{in.tensor.const_data_ptr(), nullptr,  nullptr,      y.mutable_data_ptr(),
            in.stride,                  0,        out_features, in.count,
            in.cols,                    out_features, int(activation), pattern.most,
            matrix,                     scales};
  std::optional<Rows> added;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features &&
                        bias->scalar_type() == x.scalar_type(),
                    "block_sparse_linear: bias must be [out_features] in x's dtype");
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    STD_TORCH_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == x.scalar_type(),
                    "block_sparse_linear: residual must be [..., out_features] in x's dtype");
    added.emplace(*residual, kOp);
    p.residual = added->tensor.const_data_ptr();
    p.ldr = added->stride;
  }
  ProductTasks product(p, kernels);
  const int64_t threads = threads_for(product.work());
  run_tasks(product.cut(threads), threads, [&](int64_t i) { product.run(i); });
  return y;
}

int64_t features_of(const Tensor& x, int64_t out_features, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 1, "block_sparse_linear: x must have at least one dimension");
  STD_TORCH_CHECK(x.size(x.dim() - 1) > 0 && out_features > 0 && activation >= 0 && activation <= 4,
                  "block_sparse_linear: in_features and out_features must be positive and "
                  "activation a code from 0 to 4");
  return x.size(x.dim() - 1);
}

}  // namespace

Tensor block_sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& crow_indices,
                           const Tensor& col_indices, std::optional<Tensor> bias,
                           std::optional<Tensor> residual, int64_t out_features,
                           int64_t activation) {
  check_weight(weight, x, col_indices);
  const int64_t in_features = features_of(x, out_features, activation);
  const Pattern pattern(crow_indices, col_indices, ceil_div(out_features, weight.size(1)),
                        ceil_div(in_features, weight.size(2)));
  return multiply(x, pattern, block_matrix(weight, pattern), nullptr, bias, residual, out_features,
                  activation, cpu_kernels().block_sparse[dtype_of(x, kOp)]);
}

// weight int8 [nnz, block_in / 4, block_out, 4], weight_scales float32 [out_features].
Tensor block_sparse_linear_int8(const Tensor& x, const Tensor& weight, const Tensor& weight_scales,
                                const Tensor& crow_indices, const Tensor& col_indices,
                                std::optional<Tensor> bias, std::optional<Tensor> residual,
                                int64_t out_features, int64_t activation) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(3) == 4 &&
                      weight.scalar_type() == ScalarType::Char && col_indices.dim() == 1 &&
                      weight.size(0) == col_indices.size(0),
                  "block_sparse_linear: an int8 weight must be [nnz, block_in / 4, block_out, 4] "
                  "with nnz as in col_indices");
  const int64_t block_out = weight.size(2), block_in = 4 * weight.size(1);
  check_blocks(weight.size(0), block_out, block_in);
  const int64_t in_features = features_of(x, out_features, activation);
  STD_TORCH_CHECK(block_out % 16 == 0 && in_features <= kMostInt8Inputs,
                  "block_sparse_linear: int8 takes block_out of multiples of 16 and at most ",
                  kMostInt8Inputs, " in_features, got blocks of ", block_out, "x", block_in,
                  " and ", in_features);
  STD_TORCH_CHECK(weight_scales.dim() == 1 && weight_scales.size(0) == out_features &&
                      weight_scales.scalar_type() == ScalarType::Float,
                  "block_sparse_linear: weight_scales must be float32 [out_features]");
  const Dtype dtype = dtype_of(x, kOp);
  STD_TORCH_CHECK(dtype != kFloat64,
                  "block_sparse_linear: int8 takes float32, bfloat16 and float16 rows of x");
  const Pattern pattern(crow_indices, col_indices, ceil_div(out_features, block_out),
                        ceil_div(in_features, block_in));
  const Tensor blocks = as_contiguous(weight), scales = as_contiguous(weight_scales);
  const BlockMatrix matrix{blocks.const_data_ptr(), pattern.ptr, pattern.index,
                           nullptr,                 pattern.groups, block_out,
                           block_in,                block_out * block_in, 4, 4 * block_out};
  return multiply(x, pattern, matrix, static_cast<const float*>(scales.const_data_ptr()), bias,
                  residual, out_features, activation, cpu_kernels().block_sparse_int8[dtype]);
}

// The gradients of x, of the kept blocks and of the bias; empty where not needed.
std::tuple<Tensor, Tensor, Tensor> block_sparse_linear_grad(
    const Tensor& grad, std::optional<Tensor> x, const Tensor& weight, const Tensor& crow_indices,
    const Tensor& col_indices, int64_t in_features, bool need_x, bool need_weight,
    bool need_bias) {
  check_weight(weight, grad, col_indices);
  const Rows g(grad, kOp);
  STD_TORCH_CHECK(g.cols > 0 && in_features > 0,
                  "block_sparse_linear: in_features and out_features must be positive");
  const int64_t block_out = weight.size(1), block_in = weight.size(2), rows = g.count;
  const int64_t block_cols = ceil_div(in_features, block_in);
  STD_TORCH_CHECK(block_cols <= kMostBlockColumns,
                  "block_sparse_linear: in_features must be at most ", kMostBlockColumns,
                  " blocks of ", block_in, ", got ", in_features);
  const Pattern pattern(crow_indices, col_indices, ceil_div(g.cols, block_out), block_cols);
  const Dtype dtype = dtype_of(grad, kOp);
  const BlockSparseKernels& kernels = cpu_kernels().block_sparse[dtype];
  const int32_t code = dtype_code(grad);
  const auto sums_of = [&](bool needed, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    if (!needed) return empty_strided({0}, {1}, code);
    return empty_strided(sizes, strides, dtype == kFloat64 ? code : aoti_torch_dtype_float32());
  };

  Tensor dx = need_x ? output_like(grad, in_features) : empty_strided({0}, {1}, code);
  std::optional<Transposed> transposed;
  std::optional<ProductTasks> product;
  double work = 0;
  if (need_x) {
    transposed.emplace(pattern, weight, block_cols);
    product.emplace(Product{g.tensor.const_data_ptr(), nullptr, nullptr, dx.mutable_data_ptr(),
                            g.stride, 0, in_features, rows, g.cols, in_features, 0,
                            transposed->most, transposed->matrix},
                    kernels);
    work += product->work();
  }

  // The memory order of bsr.blocks_empty: outputs fastest where the forward kernel reads them so.
  const bool out_fastest = block_out % 16 == 0;
  const int64_t out_stride = out_fastest ? 1 : block_in, in_stride = out_fastest ? block_out : 1;
  Tensor dw = sums_of(need_weight, {pattern.nnz, block_out, block_in},
                      {block_out * block_in, out_stride, in_stride});
  std::optional<Rows> in;
  BlockOuter outer{};
  if (need_weight) {
    STD_TORCH_CHECK(x, "block_sparse_linear: the gradient of the weight needs x");
    in.emplace(*x, kOp);
    STD_TORCH_CHECK(in->count == rows && in->cols == in_features &&
                        x->scalar_type() == grad.scalar_type(),
                    "block_sparse_linear: grad [..., out_features] and x [..., in_features] must "
                    "have the same leading sizes and dtype");
    outer = {g.tensor.const_data_ptr(), in->tensor.const_data_ptr(), dw.mutable_data_ptr(),
             g.stride, in->stride, rows, in_features, g.cols, pattern.ptr, pattern.index,
             block_out, block_in, out_stride, in_stride};
    work += 2.0 * rows * pattern.nnz * block_out * block_in / kSerialFlop;
  }
  Tensor db = sums_of(need_bias, {g.cols}, {1});
  if (need_bias) work += 16.0 * rows * g.cols / kSerialFlop;
  if (rows == 0) torch::stable::zero_(dw), torch::stable::zero_(db);

  const int64_t threads = threads_for(work);
  const int64_t products = need_x ? product->cut(threads) : 0;
  const int64_t outers = need_weight && rows ? std::min(pattern.nnz, threads) : 0;
  const int64_t strips = ceil_div(g.cols, kSumColumns);
  const int64_t sums = need_bias && rows ? std::min(strips, threads) : 0;
  run_tasks(products + outers + sums, threads, [&](int64_t i) {
    if (i < products) return product->run(i);
    i -= products;
    if (i < outers)
      return kernels.outer(outer, pattern.nnz * i / outers, pattern.nnz * (i + 1) / outers,
                           thread_scratch(kernels.outer_scratch(outer)));
    i -= outers;
    kernels.column_sums(g.tensor.const_data_ptr(), g.stride, rows,
                        strips * i / sums * kSumColumns,
                        std::min(g.cols, strips * (i + 1) / sums * kSumColumns),
                        db.mutable_data_ptr());
  });
  const auto narrowed = [&](const Tensor& t) {
    return dtype_code(t) == code ? t : torch::stable::to(t, grad.scalar_type());
  };
  return {dx, narrowed(dw), narrowed(db)};
}

}  // namespace lean_kernels

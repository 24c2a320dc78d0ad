// SPDX-License-Identifier: Apache-2.0
// block_sparse_linear and its gradients on CPU: tensors in, tasks out to torch's thread pool.
#include <algorithm>
#include <optional>
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

// Indices of a pattern. Checked on every call: it is cheap, and no kernel can then leave its bounds.
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

void check_blocks(int64_t nnz, int64_t block_out, int64_t block_in) {
  STD_TORCH_CHECK(block_out > 0 && block_in > 0 && block_out <= kMostBlock &&
                      block_in <= kMostBlock && nnz <= kMostElements / (block_out * block_in),
                  "block_sparse_linear: block sizes must lie in [1, ", kMostBlock,
                  "] and the weight hold at most 2^46 elements, got ", nnz, " blocks of ", block_out,
                  "x", block_in);
}

void check_weight(const Tensor& weight, const Tensor& x, const Tensor& col) {
  STD_TORCH_CHECK(weight.dim() == 3 && col.dim() == 1 && weight.size(0) == col.size(0),
                  "block_sparse_linear: weight must be [nnz, block_out, block_in] with nnz as in "
                  "col_indices");
  check_blocks(weight.size(0), weight.size(1), weight.size(2));
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(),
                  "block_sparse_linear: x and weight must have the same dtype");
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

// Threads for some work, when two are worth it from `serial` on.
int64_t threads_for(double flop, double serial) {
  if (flop < serial) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), int64_t(2 * flop / serial));
}

void run_product(const Product& p, const BlockSparseKernels& kernels) {
  if (p.rows == 0) return;
  const RowSplit split = kernels.product_rows(p);
  const int64_t weights = p.w.ptr[p.w.groups] * p.w.block_in * p.w.block_out;
  const double flop = 2.0 * std::max<int64_t>(p.rows, split.per_weight) * weights +
                      16.0 * p.rows * p.out_features;
  const int64_t threads = threads_for(flop, split.serial);
  const int64_t unit = split.unit, units = ceil_div(p.rows, unit);
  int64_t chunks = ceil_div(p.rows, split.most / unit * unit);
  if (chunks > threads) {
    chunks = std::min(units, ceil_div(chunks, threads) * threads);
  } else {
    chunks = std::max(chunks, std::min({threads, units, p.rows / split.least}));
  }
  const int64_t splits = std::min(p.w.groups, ceil_div(threads, chunks));
  const auto row_at = [&](int64_t chunk) {
    return std::min(p.rows, units * chunk / chunks * unit);
  };
  run_tasks(chunks * splits, threads, [&](int64_t i) {
    const int64_t chunk = i / splits, part = i % splits;
    const Range range{row_at(chunk), row_at(chunk + 1), split_groups(p.w, part, splits),
                      split_groups(p.w, part + 1, splits)};
    if (range.row_begin == range.row_end || range.group_begin == range.group_end) return;
    const int64_t rows = range.row_end - range.row_begin;
    kernels.product(p, range, thread_scratch(kernels.product_scratch(p, rows)));
  });
}

// Not stable::new_empty, which finds the operator by its name on each call.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// [..., features] like x [..., cols], contiguous.
Tensor output_like(const Tensor& x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = features;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1))
    strides[d] = stride;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_strided(sizes, strides, dtype);
}

// activation(x Wᵀ + bias) + residual; what differs by the kind of weight is in `matrix` and `scales`.
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
  run_product(p, kernels);
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
                  kMostInt8Inputs, " in_features, got blocks of ", block_out, "x", block_in, " and ",
                  in_features);
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

Tensor block_sparse_linear_grad_input(const Tensor& grad, const Tensor& weight,
                                      const Tensor& crow_indices, const Tensor& col_indices,
                                      int64_t in_features) {
  check_weight(weight, grad, col_indices);
  const Rows in(grad, kOp);
  STD_TORCH_CHECK(in.cols > 0 && in_features > 0,
                  "block_sparse_linear: in_features and out_features must be positive");
  const int64_t block_cols = ceil_div(in_features, weight.size(2));
  STD_TORCH_CHECK(block_cols <= kMostBlockColumns, "block_sparse_linear: in_features must be at most ",
                  kMostBlockColumns, " blocks of ", weight.size(2), ", got ", in_features);
  const Pattern pattern(crow_indices, col_indices, ceil_div(in.cols, weight.size(1)), block_cols);

  // The transposed pattern, by counting sort: entries of each block column in row order.
  std::vector<int32_t> ptr(block_cols + 1), index(pattern.nnz), position(pattern.nnz);
  for (int64_t e = 0; e < pattern.nnz; ++e) ++ptr[pattern.index[e] + 1];
  int64_t most = 0;
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
  Tensor dx = output_like(grad, in_features);
  const BlockMatrix transposed{weight.const_data_ptr(), ptr.data(),       index.data(),
                               position.data(),         block_cols,       weight.size(2),
                               weight.size(1),          weight.stride(0), weight.stride(2),
                               weight.stride(1)};
  const Product p{in.tensor.const_data_ptr(), nullptr,     nullptr,     dx.mutable_data_ptr(),
                  in.stride,                  0,           in_features, in.count,
                  in.cols,                    in_features, 0,           most,
                  transposed};
  run_product(p, cpu_kernels().block_sparse[dtype_of(grad, kOp)]);
  return dx;
}

Tensor block_sparse_linear_grad_weight(const Tensor& grad, const Tensor& x,
                                       const Tensor& crow_indices, const Tensor& col_indices,
                                       int64_t block_out, int64_t block_in) {
  const Rows g(grad, kOp), in(x, kOp);
  STD_TORCH_CHECK(g.cols > 0 && in.cols > 0 && g.count == in.count &&
                      grad.scalar_type() == x.scalar_type() && col_indices.dim() == 1,
                  "block_sparse_linear: grad [..., out_features] and x [..., in_features] must "
                  "have the same leading sizes and dtype, and col_indices be [nnz]");
  check_blocks(col_indices.size(0), block_out, block_in);
  const int64_t block_cols = ceil_div(in.cols, block_in);
  const Pattern pattern(crow_indices, col_indices, ceil_div(g.cols, block_out), block_cols);
  const Dtype dtype = dtype_of(x, kOp);
  // The memory order of bsr.blocks_empty: outputs fastest where the forward kernel reads them so.
  const bool out_fastest = block_out % 16 == 0;
  const int64_t out_stride = out_fastest ? 1 : block_in, in_stride = out_fastest ? block_out : 1;
  Tensor out = empty_strided({pattern.nnz, block_out, block_in},
                             {block_out * block_in, out_stride, in_stride},
                             dtype == kFloat64 ? aoti_torch_dtype_float64()
                                               : aoti_torch_dtype_float32());
  if (g.count == 0) torch::stable::zero_(out);
  if (g.count > 0 && pattern.nnz > 0) {
    const BlockSparseKernels& kernels = cpu_kernels().block_sparse[dtype];
    const BlockOuter p{g.tensor.const_data_ptr(), in.tensor.const_data_ptr(),
                       out.mutable_data_ptr(),    g.stride,
                       in.stride,                 g.count,
                       in.cols,                   g.cols,
                       pattern.ptr,               pattern.index,
                       block_out,                 block_in,
                       out_stride,                in_stride};
    const double flop = 2.0 * g.count * pattern.nnz * block_out * block_in;
    const int64_t threads = threads_for(flop, kSerialFlop);
    const int64_t parts = std::min(pattern.nnz, threads);
    run_tasks(parts, threads, [&](int64_t i) {
      kernels.outer(p, pattern.nnz * i / parts, pattern.nnz * (i + 1) / parts,
                    thread_scratch(kernels.outer_scratch(p)));
    });
  }
  return dtype == kFloat32 || dtype == kFloat64 ? out : torch::stable::to(out, x.scalar_type());
}

}  // namespace lean_kernels

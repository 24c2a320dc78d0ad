// SPDX-License-Identifier: Apache-2.0
// add_layer_norm of one instruction set: a row is read once, and stays in L1 until it is written.
#include "../isa.h"

#include <algorithm>

#include "../add_layer_norm.h"
#include "row_norm.h"

namespace lean_kernels {
namespace {

constexpr int kLine = 64;  // bytes

// row = x (+ residual), widened; returns the sums of it and of its squares.
template <bool added, class S, class A>
LK_INLINE Terms<A, 2> read_row(const S* x, const S* residual, A* row, int64_t features) {
  const auto terms = [&](int64_t i, auto kind) {
    auto v = read(kind, x + i);
    if constexpr (added) v += read(kind, residual + i);
    keep(row + i, v);
    return Terms<decltype(kind), 2>{{v, v * v}};
  };
  return sums_over<A, 2>(features, terms);
}

template <class S>
void add_layer_norm_rows(const AddLayerNorm& p, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulator<S>::type;
  const int64_t features = p.features;
  const A* weight = static_cast<const A*>(p.weight);
  const A* bias = static_cast<const A*>(p.bias);
  A* row = static_cast<A*>(scratch);
  const auto source = [&](int64_t r) { return p.indices ? p.indices[r] : r; };
  for (int64_t r = begin; r < end; ++r) {
    const int64_t from = source(r), after = source(std::min(r + 1, end - 1));
    const S* x = static_cast<const S*>(p.x) + from * p.ldx;
    const S* residual = static_cast<const S*>(p.residual) + (p.residual ? from * p.ldr : 0);
    const S* next = static_cast<const S*>(p.x) + after * p.ldx;
    const S* next_residual = p.residual ? static_cast<const S*>(p.residual) + after * p.ldr : next;
    // No processor foresees the next row where rows are chosen, nor across the end of a page.
    const auto fetch = [&](int64_t i) {
      for (int k = 0; k < kLanes<A>; k += kLine / int(sizeof(S))) {
        __builtin_prefetch(next + i + k);
        __builtin_prefetch(next_residual + i + k);
      }
    };
    const Terms<A, 2> sums = p.residual ? read_row<true>(x, residual, row, features)
                                        : read_row<false>(x, residual, row, features);
    const auto [sum, squares] = sums.of;
    const A mean = sum / A(features);
    const A variance = variance_of(row, mean, squares, features);
    const A scale = A(1) / std::sqrt(variance + A(p.eps));
    write_normal<false>(static_cast<S*>(p.y) + r * features, row, mean, scale, weight, bias,
                        features, fetch);
  }
}

}  // namespace

const AddLayerNormKernel LEAN_KERNELS_ISA::add_layer_norm[kDtypes] = {
    add_layer_norm_rows<float>, add_layer_norm_rows<BFloat16>, add_layer_norm_rows<Float16>,
    add_layer_norm_rows<double>};

}  // namespace lean_kernels

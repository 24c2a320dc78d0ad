// SPDX-License-Identifier: Apache-2.0
// add_layer_norm of one instruction set: a row is read once, and stays in L1 until it is written.
#include "../isa.h"

#include <algorithm>

#include "../add_layer_norm.h"
#include "vec.h"

namespace lean_kernels {
namespace {

constexpr int kLine = 64;  // bytes

template <class A>
LK_INLINE A sum_lanes(const Vec<A> (&part)[4]) {
  A lanes[kLanes<A>];
  store(lanes, (part[0] + part[1]) + (part[2] + part[3]));
  for (int step = kLanes<A> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// row = x (+ residual), widened; returns its sum.
template <bool added, class S, class A>
LK_INLINE A read_row(const S* x, const S* residual, A* row, int64_t features) {
  constexpr int W = kLanes<A>;
  Vec<A> part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= features; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      Vec<A> v = load_wide(x + i + k * W);
      if constexpr (added) v += load_wide(residual + i + k * W);
      store(row + i + k * W, v);
      part[k] += v;
    }
  for (; i + W <= features; i += W) {
    Vec<A> v = load_wide(x + i);
    if constexpr (added) v += load_wide(residual + i);
    store(row + i, v);
    part[0] += v;
  }
  A sum = sum_lanes<A>(part);
  for (; i < features; ++i) {
    A v = widen(x[i]);
    if constexpr (added) v += widen(residual[i]);
    row[i] = v;
    sum += v;
  }
  return sum;
}

// Meanwhile fetches the row after this one from `next` and `next_residual`, which no processor
// foresees where rows are chosen, nor across the end of a page.
template <class S, class A>
LK_INLINE A squared_distance(const A* row, A mean, int64_t features, const S* next,
                             const S* next_residual) {
  constexpr int W = kLanes<A>;
  const Vec<A> center = splat(mean);
  Vec<A> part[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= features; i += 4 * W) {
    for (int k = 0; k < 4 * W; k += kLine / int(sizeof(S))) {
      __builtin_prefetch(next + i + k);
      __builtin_prefetch(next_residual + i + k);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec<A> v = load(row + i + k * W) - center;
      part[k] += v * v;
    }
  }
  for (; i + W <= features; i += W) {
    const Vec<A> v = load(row + i) - center;
    part[0] += v * v;
  }
  A sum = sum_lanes<A>(part);
  for (; i < features; ++i) sum += (row[i] - mean) * (row[i] - mean);
  return sum;
}

template <class S>
void add_layer_norm_rows(const AddLayerNorm& p, int64_t begin, int64_t end, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
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
    const A sum = p.residual ? read_row<true>(x, residual, row, features)
                             : read_row<false>(x, residual, row, features);
    const A mean = sum / A(features);
    const A variance = squared_distance(row, mean, features, next, next_residual) / A(features);
    const A scale = A(1) / std::sqrt(variance + A(p.eps));
    S* y = static_cast<S*>(p.y) + r * features;
    const Vec<A> centers = splat(mean), scales = splat(scale);
    int64_t i = 0;
    if (bias) {
      for (; i + W <= features; i += W)
        store_narrow(y + i, (load(row + i) - centers) * scales * load(weight + i) + load(bias + i));
    } else {
      for (; i + W <= features; i += W)
        store_narrow(y + i, (load(row + i) - centers) * scales * load(weight + i));
    }
    for (; i < features; ++i)
      narrow((row[i] - mean) * scale * weight[i] + (bias ? bias[i] : A(0)), y + i);
  }
}

}  // namespace

const AddLayerNormKernel LEAN_KERNELS_ISA::add_layer_norm[kDtypes] = {
    add_layer_norm_rows<float>, add_layer_norm_rows<BFloat16>, add_layer_norm_rows<Float16>,
    add_layer_norm_rows<double>};

}  // namespace lean_kernels

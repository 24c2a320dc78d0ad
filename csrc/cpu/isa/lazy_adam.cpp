// SPDX-License-Identifier: Apache-2.0
// lazy_adam of one instruction set: each row and its moments are read and written once.
#include "../isa.h"

#include <algorithm>

#include "../lazy_adam.h"
#include "row_norm.h"

namespace lean_kernels {
namespace {

constexpr int64_t kAhead = 4;  // rows lie anywhere: those this much later are fetched
constexpr int kLine = 64;      // bytes

template <class A>
LK_INLINE A square_root(A v) {
  if constexpr (std::is_arithmetic_v<A>) {
    return std::sqrt(v);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(A, Vec<float>)) return (A)_mm512_sqrt_ps((__m512)v);
    if constexpr (__is_same(A, Vec<double>)) return (A)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
    if constexpr (__is_same(A, Vec<float>)) return (A)_mm256_sqrt_ps((__m256)v);
    if constexpr (__is_same(A, Vec<double>)) return (A)_mm256_sqrt_pd((__m256d)v);
#else
    for (int i = 0; i < int(sizeof(A) / sizeof(v[0])); ++i) v[i] = std::sqrt(v[i]);
    return v;
#endif
  }
}

template <class S>
void lazy_adam_rows(const LazyAdam& p, int64_t begin, int64_t end) {
  using A = typename Accumulator<S>::type;
  const A beta1 = A(p.beta1), beta2 = A(p.beta2), rest1 = A(1 - p.beta1), rest2 = A(1 - p.beta2);
  const A step_size = A(p.step_size), root = A(1 / p.root), eps = A(p.eps);
  const auto fetch = [&](int64_t r) {
    const int64_t from = p.rows[r] * p.features;
    for (int64_t i = 0; i < p.features; i += kLine / int64_t(sizeof(S)))
      for (void* table : {p.param, p.exp_avg, p.exp_avg_sq})
        __builtin_prefetch(static_cast<S*>(table) + from + i, 1);
  };
  for (int64_t r = begin; r < std::min(begin + kAhead, end); ++r) fetch(r);
  for (int64_t r = begin; r < end; ++r) {
    if (r + kAhead < end) fetch(r + kAhead);
    const int64_t at = p.rows[r] * p.features;
    S* param = static_cast<S*>(p.param) + at;
    S* exp_avg = static_cast<S*>(p.exp_avg) + at;
    S* exp_avg_sq = static_cast<S*>(p.exp_avg_sq) + at;
    const S* grad = static_cast<const S*>(p.grad) + r * p.features;
    each_feature<A>(p.features, [&](int64_t i, auto kind) {
      const auto g = read(kind, grad + i);
      const auto m = read(kind, exp_avg + i) * beta1 + g * rest1;
      const auto v = read(kind, exp_avg_sq + i) * beta2 + g * g * rest2;
      write(exp_avg + i, m);
      write(exp_avg_sq + i, v);
      write(param + i, read(kind, param + i) - step_size * m / (square_root(v) * root + eps));
    });
  }
}

}  // namespace

const LazyAdamKernel LEAN_KERNELS_ISA::lazy_adam[kDtypes] = {
    lazy_adam_rows<float>, lazy_adam_rows<BFloat16>, lazy_adam_rows<Float16>,
    lazy_adam_rows<double>};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// low_rank_embedding and its gradient, for one instruction set.
//
// Every output is one sum over the rank in order, started from the bias, whatever the height of the
// tile it is computed in: a row depends neither on the rest of the batch nor on threads.
#include "low_rank_gradient.h"
#include "low_rank_logits.h"

#include "../isa.h"

namespace lean_kernels {
namespace {

template <class S>
LowRankSizes sizes(const LowRank& p) {
  using A = typename Accumulator<S>::type;
  LowRankSizes s;
  s.strips = ceil_div(p.features, kStrip<A>);
  s.padded_rank = padded_rank<A>(p.rank);
  s.made_stride = made_stride<A>(p.features);
  s.packed = size_t(s.strips * kStrip<A> * p.rank);
  s.grad_packed = size_t(p.features * s.padded_rank);
  s.row_scratch = size_t(s.made_stride + p.rank);
  s.grad_row_scratch = size_t((p.activation ? 2 : 1) * s.made_stride + s.padded_rank);
  s.position_scratch = sizeof(Copy<S, A>) / sizeof(A);
  s.slack = size_t(s.made_stride + kLanes<A>);
  s.panel_rows = kWideRows;
  return s;
}

template <class S>
constexpr LowRankKernels low_rank_kernels() {
  constexpr int64_t kWords = kStrip<typename Accumulator<S>::type>;
  return {sizes<S>, pack<S>,         grad_pack<S>, rows<S>,   grad<S>,
          sum<S>,   sum_decoders<S>, kWords,       pack_x<S>, logits<S>};
}

}  // namespace

const LowRankKernels LEAN_KERNELS_ISA::low_rank[kDtypes] = {
    low_rank_kernels<float>(), low_rank_kernels<BFloat16>(), low_rank_kernels<Float16>(),
    low_rank_kernels<double>()};

}  // namespace lean_kernels

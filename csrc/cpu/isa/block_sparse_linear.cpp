// SPDX-License-Identifier: Apache-2.0
// The inner loops of block_sparse_linear, for one instruction set.
//
// Every output is a sum over its group's entries in order, and over the inputs of a block in order,
// started from the bias, whatever the height of the tile it is computed in: a row's result depends
// neither on the rest of the batch nor on threads.
#include "../isa.h"
#include "block_sparse_columns.h"
#include "block_sparse_few_rows.h"
#include "block_sparse_lanes_out.h"
#include "block_sparse_outer.h"

namespace lean_kernels {
namespace {

template <class S, class M>
void product_by_width(const Product& p, const Range& t, void* scratch) {
  if (p.w.block_out % (2 * kLanes<typename M::A>) == 0)
    return product_lanes_out<S, M, 2, kWideRows>(p, t, scratch);
  product_lanes_out<S, M, 1, kNarrowRows>(p, t, scratch);
}

// The order of additions is that of the block shape alone, the same for every batch; kFewRows adds
// as kFewOutputs does.
enum Nest { kLanesOut, kColumns, kFewOutputs, kFewRows };
template <class S>
Nest nest_of(const Product& p, int64_t rows) {
  if (p.w.block_out % kLanes<typename Accumulator<S>::type> == 0) return kLanesOut;
#if defined(__AVX512F__)
  if (p.w.block_out == 1 && p.w.block_in % kHeld == 0) return kColumns;
  if (takes_few_rows<S>(p.w, rows)) return kFewRows;
#endif
  return kFewOutputs;
}

template <class S>
void product(const Product& p, const Range& t, void* scratch) {
  const Nest nest = nest_of<S>(p, t.row_end - t.row_begin);
  if (nest == kFewOutputs) return product_few_outputs<S>(p, t, scratch);
#if defined(__AVX512F__)
  if (nest == kColumns) return product_by_columns<S>(p, t, scratch);
  if constexpr (!__is_same(S, double))
    if (nest == kFewRows) return product_few_rows<S>(p, t, scratch);
  if constexpr (__is_same(S, BFloat16))
    if (p.w.block_in % 2 == 0 && BFloat16Pairs::fast())
      return product_by_width<S, BFloat16Pairs>(p, t, scratch);
#endif
  product_by_width<S, MultiplyAdd<typename Accumulator<S>::type>>(p, t, scratch);
}

template <class S>
RowSplit product_rows(const Product& p) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  const Nest nest = nest_of<S>(p, p.rows);
#if defined(__AVX512F__)
  if (nest == kColumns) return {W, 128, copies_parts<S>(p, p.rows) ? 128 : 32};
#endif
  if (nest != kLanesOut) return {W, 72, 24};
  if (weights_are_near<S>(p) && !packs_blocks<S>(p)) return {1, 36, 8};
  return {1, 72, 24};
}

template <class S>
size_t product_scratch(const Product& p, int64_t rows) {
  using A = typename Accumulator<S>::type;
  const Nest nest = nest_of<S>(p, rows);
#if defined(__AVX512F__)
  if (nest == kColumns) return ColumnsScratch<S>(p, rows).bytes;
  if (nest == kFewRows) return sizeof(float) * size_t(few_rows_scratch(p, rows));
#endif
  return sizeof(A) * size_t(nest == kLanesOut ? lanes_out_scratch<S>(p, rows)
                                              : few_outputs_scratch<S>(p, rows));
}

template <class S>
constexpr BlockSparseKernels block_sparse_kernels() {
  return {product_rows<S>,  product_scratch<S>, product<S>,
          outer_scratch<S>, outer<S>,           column_sums<S>};
}

}  // namespace

const BlockSparseKernels LEAN_KERNELS_ISA::block_sparse[kDtypes] = {
    block_sparse_kernels<float>(), block_sparse_kernels<BFloat16>(),
    block_sparse_kernels<Float16>(), block_sparse_kernels<double>()};

}  // namespace lean_kernels

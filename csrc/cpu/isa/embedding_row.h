// SPDX-License-Identifier: Apache-2.0
// The end of an embedding's row, for one instruction set: the row stays in L1 until it is written.
#pragma once

#include "../embedding_row.h"
#include "row_norm.h"

namespace lean_kernels {
namespace {

// scratch = made + the added rows; returns its sum.
template <class S, class A>
LK_INLINE A add_rows(const EmbeddingRows& p, int64_t row, const A* made, A* scratch) {
  const auto from = [&](const AddedTable& t) {
    return static_cast<const S*>(t.table) + t.row(row) * t.stride;
  };
  const S* first = from(p.added[0]);
  if (!p.added[1].ids)
    return sum_over<A>(p.features, [&](int64_t i, auto kind) {
      return keep(scratch + i, read(kind, made + i) + read(kind, first + i));
    });
  const S* second = from(p.added[1]);
  return sum_over<A>(p.features, [&](int64_t i, auto kind) {
    return keep(scratch + i,
                read(kind, made + i) + read(kind, first + i) + read(kind, second + i));
  });
}

template <bool streamed, class S, class A>
void finish_row_as(const EmbeddingRows& p, int64_t row, const A* made, A* scratch) {
  const int64_t features = p.features;
  S* y = static_cast<S*>(p.out) + row * p.stride;
  A sum = 0;
  if (p.added[0].ids) {
    sum = add_rows<S>(p, row, made, scratch);
    made = scratch;
  } else if (p.norm == kLayerNorm) {
    sum = sum_over<A>(features, [&](int64_t i, auto kind) { return read(kind, made + i); });
  }
  if (p.norm == kNoNorm) {
    write_row<streamed>(y, features, [&](int64_t i, auto kind) { return read(kind, made + i); });
    return;
  }
  const A center = p.norm == kLayerNorm ? sum / A(features) : A(0);
  const A variance = squared_distance(made, center, features) / A(features);
  write_normal<streamed>(y, made, center, A(1) / std::sqrt(variance + A(p.eps)),
                         static_cast<const A*>(p.weight), static_cast<const A*>(p.bias), features);
}

// Row `row` of the output from its accumulators `made` [features], which are left as they are
// unless `scratch` [features] is the same memory. After the last row: `end_of_stores`.
template <class S, class A>
inline void finish_row(const EmbeddingRows& p, int64_t row, const A* made, A* scratch) {
  if (p.stream) {
    finish_row_as<true, S>(p, row, made, scratch);
  } else {
    finish_row_as<false, S>(p, row, made, scratch);
  }
}

}  // namespace
}  // namespace lean_kernels

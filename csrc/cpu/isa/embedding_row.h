// SPDX-License-Identifier: Apache-2.0
// The end of an embedding's row, for one instruction set: the row stays in L1 until it is written.
#pragma once

#include "../embedding_row.h"
#include "row_norm.h"

namespace lean_kernels {
namespace {

template <class S>
LK_INLINE const S* added_row(const AddedTable& t, int64_t row) {
  return static_cast<const S*>(t.table) + t.row(row) * t.stride;
}

// The sums of value(i, kind) and of its squares.
template <class A, class Value>
LK_INLINE Terms<A, 2> moments(int64_t features, Value value) {
  return sums_over<A, 2>(features, [&](int64_t i, auto kind) {
    const auto v = value(i, kind);
    return Terms<decltype(kind), 2>{{v, v * v}};
  });
}

// scratch = made + the added rows; returns the sums of it and of its squares.
template <class S, class A>
LK_INLINE Terms<A, 2> add_rows(const EmbeddingRows& p, int64_t row, const A* made, A* scratch) {
  const S* first = added_row<S>(p.added[0], row);
  if (!p.added[1].ids)
    return moments<A>(p.features, [&](int64_t i, auto kind) {
      return keep(scratch + i, read(kind, made + i) + read(kind, first + i));
    });
  const S* second = added_row<S>(p.added[1], row);
  return moments<A>(p.features, [&](int64_t i, auto kind) {
    return keep(scratch + i,
                read(kind, made + i) + read(kind, first + i) + read(kind, second + i));
  });
}

// What the next row reads and writes: no processor foresees it.
template <bool streamed, class S>
struct FetchRow {
  const S* from[2];
  const S* to;

  FetchRow(const EmbeddingRows& p, int64_t row)
      : from{p.added[0].ids ? added_row<S>(p.added[0], row) : nullptr,
             p.added[1].ids ? added_row<S>(p.added[1], row) : nullptr},
        to(static_cast<const S*>(p.out) + row * p.stride) {}

  LK_INLINE void operator()(int64_t i) const {
    if (from[0]) __builtin_prefetch(from[0] + i);
    if (from[1]) __builtin_prefetch(from[1] + i);
    if constexpr (!streamed) __builtin_prefetch(to + i, 1);
  }
};

template <bool streamed, class S, class A>
void finish_row_as(const EmbeddingRows& p, int64_t row, const A* made, A* scratch, int64_t next) {
  const int64_t features = p.features;
  const FetchRow<streamed, S> fetch(p, next);
  S* y = static_cast<S*>(p.out) + row * p.stride;
  Terms<A, 2> sums{};
  if (p.added[0].ids) {
    sums = add_rows<S>(p, row, made, scratch);
    made = scratch;
  } else if (p.norm != kNoNorm) {
    sums = moments<A>(features, [&](int64_t i, auto kind) { return read(kind, made + i); });
  }
  if (p.norm == kNoNorm) {
    write_row<streamed>(
        y, features, [&](int64_t i, auto kind) { return read(kind, made + i); }, fetch);
    return;
  }
  const A center = p.norm == kLayerNorm ? sums.of[0] / A(features) : A(0);
  const A variance = variance_of(made, center, sums.of[1], features);
  write_normal<streamed>(y, made, center, A(1) / std::sqrt(variance + A(p.eps)),
                         static_cast<const A*>(p.weight), static_cast<const A*>(p.bias), features,
                         fetch);
}

// Row `row` of the output from its accumulators `made` [features], which are left as they are
// unless `scratch` [features] is the same memory; `next` comes next. After the last row:
// `end_of_stores`.
template <class S, class A>
inline void finish_row(const EmbeddingRows& p, int64_t row, const A* made, A* scratch,
                       int64_t next) {
  if (p.stream) {
    finish_row_as<true, S>(p, row, made, scratch, next);
  } else {
    finish_row_as<false, S>(p, row, made, scratch, next);
  }
}

}  // namespace
}  // namespace lean_kernels

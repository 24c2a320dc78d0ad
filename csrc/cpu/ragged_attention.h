// SPDX-License-Identifier: Apache-2.0
// What the per-instruction-set kernels of ragged_attention take: plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lean_kernels {

// A [rows, heads, dim] tensor whose dim is contiguous, or [rows, heads] with both strides.
struct Heads {
  const void* data;
  int64_t row, head;  // strides in elements
};

// One call. Outputs are contiguous.
struct Attention {
  Heads query, key, value;
  int64_t heads, group, dim;  // query heads, query heads per key head, D
  double scale;
  int64_t left, right;  // -1: unlimited
  const int32_t* positions;      // null: consecutive, sequences end together
  const int32_t* key_positions;  // null exactly where positions are
  bool exclude_diagonal;

  void* out;  // [T, H, D]
  void* lse;  // [T, H], accumulator type, natural logarithm
  // Scores of each head and of each segment of query rows, accumulator type: head h of a task adds
  // its keys at scores + h * scores_head + task.scores_at. Null: not asked for.
  void* scores;
  int64_t scores_head;

  // Gradients only.
  Heads grad_out;
  Heads grad_scores;  // accumulator type; null data: none
  bool mean;          // a probability counts 1 / (rows of the sequence * score_heads)
  int64_t score_heads;
  void *grad_query, *grad_key, *grad_value;
};

struct Sequence {
  int64_t query, rows;  // first row and number of rows
  int64_t key, keys;
};

// One key head of one sequence with the query rows [row_begin, row_end) of the sequence, which see
// no key outside [key_begin, key_end) of it.
struct AttentionTask {
  Sequence sequence;
  int64_t key_head;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  int64_t scores_at;
};

struct Span {
  int64_t begin, end;
};

namespace {

// Number of values below `bound` in a rising array.
inline int64_t count_below(const int32_t* values, int64_t size, int64_t bound) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Keys of the sequence whose distance from a query row's position lies in [-left, right]; a
// negative bound is none.
inline Span keys_within(const Attention& p, const Sequence& s, int64_t row, int64_t left,
                        int64_t right) {
  Span span{0, s.keys};
  if (p.positions) {
    const int64_t at = p.positions[s.query + row];
    const int32_t* keys = p.key_positions + s.key;
    if (left >= 0) span.begin = count_below(keys, s.keys, at - left);
    if (right >= 0) span.end = count_below(keys, s.keys, at + right + 1);
  } else {
    const int64_t at = s.keys - s.rows + row;
    if (left >= 0 && at - left > 0) span.begin = at - left;
    if (right >= 0 && at + right + 1 < s.keys) span.end = at + right + 1;
  }
  if (span.begin > s.keys) span.begin = s.keys;
  if (span.end < span.begin) span.end = span.begin;
  return span;
}

}  // namespace

// One instruction set's kernels for one storage type. Scratch in bytes.
struct AttentionKernels {
  size_t (*forward_scratch)(const Attention&, const AttentionTask&);
  // `next`: the task this thread takes up after this one, or null.
  void (*forward)(const Attention&, const AttentionTask&, const AttentionTask* next,
                  void* scratch);
  size_t (*grad_scratch)(const Attention&, const AttentionTask&);
  void (*grad)(const Attention&, const AttentionTask&, void* scratch);
};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// The output projection over low-rank rows, for one instruction set.
#pragma once

#include "low_rank_rows.h"

namespace lean_kernels {
namespace {

// x as panels [depth][height]; the shift is one more column, of which all words have the code 1.
template <class S>
void pack_x(const LowRankLogits& p, void* packed) {
  using A = typename Accumulator<S>::type;
  A* to = static_cast<A*>(packed);
  const Panels cut(p.rows, kWideRows);
  for (int64_t i = 0, at = 0, height; i < cut.count; ++i, at += height) {
    height = cut.height + (i < cut.taller);
    const S* x = static_cast<const S*>(p.x) + at * p.x_stride;
    transpose_codes<A>(
        p.rank, height, [&](int64_t r) { return x + r * p.x_stride; },
        [](int64_t) { return A(1); }, to);
    to += p.rank * height;
    if (!p.shift) continue;
    for (int64_t r = 0; r < height; ++r) *to++ = widen(static_cast<const S*>(p.shift)[at + r]);
  }
}

// Fetches memory [next, end) into L2, a line at each call. All at once lines fill the queue of
// misses, and loads wait for it; out of order they come late.
struct FetchLines {
  const char *next, *end;

  LK_INLINE void operator()() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

// Codes of words [begin, end) as [strip][depth][kStrip], and their bias; past the last word of the
// vocabulary it is repeated. Fetches those of the next group.
template <class S, class C, class A>
void pack_words(const LowRankLogits& p, int64_t begin, int64_t end, A* words, A* bias) {
  constexpr int64_t N = kStrip<A>;
  for (int64_t v = begin; v < end; v += N, words += p.depth() * N, bias += N) {
    const auto word = [&](int64_t i) { return min_of(v + i, p.vocabulary - 1); };
    const auto row = [&](int64_t i) {
      return static_cast<const C*>(p.codes) + word(i) * p.code_stride;
    };
    transpose_codes<A>(
        p.rank, N, row,
        [&](int64_t i) { return p.scales ? A(p.scales[word(i)]) : A(1); }, words,
        FetchLines{reinterpret_cast<const char*>(row(p.group)),
                   reinterpret_cast<const char*>(row(p.group + N))});
    for (int64_t i = 0; i < N; ++i) {
      if (p.shift) words[p.rank * N + i] = 1;
      bias[i] = p.bias ? widen(static_cast<const S*>(p.bias)[word(i)]) : A(0);
    }
  }
}

template <class S, class C>
void logits_of(const LowRankLogits& p, const void* packed, int64_t begin, int64_t end,
               void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int64_t N = kStrip<A>;
  A* words = static_cast<A*>(scratch);
  A bias[kLogitStrips * N], sums[kWideRows * N];
  const Panels cut(p.rows, kWideRows);
  const auto taller = tile_for<A, 2>(cut.height + 1), rest = tile_for<A, 2>(cut.height);
  for (int64_t group = begin; group < end; group += p.group) {
    const int64_t last = min_of(group + p.group, end);
    pack_words<S, C>(p, group, last, words, bias);
    const A* x = static_cast<const A*>(packed);
    // Row by row of panels: few pages are written in turn, and lines soon are whole.
    for (int64_t i = 0, at = 0, height; i < cut.count; ++i, at += height) {
      height = cut.height + (i < cut.taller);
      const A* w = words;
      for (int64_t v = group; v < last; v += N, w += p.depth() * N) {
        S* out = static_cast<S*>(p.out) + at * p.vocabulary + v;
        const bool direct = std::is_same_v<S, A> && last - v >= N;
        multiply(i < cut.taller ? taller : rest, x, height, w, N, p.depth(), bias + (v - group),
                 false, direct ? reinterpret_cast<A*>(out) : sums, direct ? p.vocabulary : N);
        if (!direct)
          finish_as<kIdentity>(sums, N, int(height), min_of(N, last - v),
                               static_cast<const S*>(nullptr), 0, out, p.vocabulary);
      }
      x += height * p.depth();
    }
  }
}

template <class S>
void logits(const LowRankLogits& p, const void* packed, int64_t begin, int64_t end,
            void* scratch) {
  const auto of = p.scales ? logits_of<S, int8_t> : logits_of<S, S>;
  of(p, packed, begin, end, scratch);
}

}  // namespace
}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// The gradient of low_rank_embedding, for one instruction set.
#pragma once

#include "low_rank_rows.h"

namespace lean_kernels {
namespace {

constexpr int64_t kBlock = 128;  // features of the decoder that stay in L1
constexpr int64_t kFetched = 96;  // rows of the gradient: they must fit L2

// The decoder as [strip of the padded rank][features][strip]: the strips of kStrip first, then one
// of half as much.
template <class S>
void grad_pack(const LowRank& p, void* packed) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>, N = kStrip<A>;
  A* to = static_cast<A*>(packed);
  const S* from = static_cast<const S*>(p.decoder);
  for (int64_t k = 0; k < padded_rank<A>(p.rank); k += N) {
    const int64_t strip = min_of<int64_t>(N, padded_rank<A>(p.rank) - k);
    for (int64_t o = 0; o < p.features; ++o, to += strip) {
      const S* row = from + o * p.decoder_out + k * p.decoder_in;
      int64_t c = 0;
      if (p.decoder_in == 1)
        for (; c + W <= min_of(strip, p.rank - k); c += W) store(to + c, load_wide(row + c));
      for (; c < strip; ++c) to[c] = k + c < p.rank ? widen(row[c * p.decoder_in]) : A(0);
    }
  }
}

template <int kActivation, class A>
LK_INLINE void times_slope(A* sums, const A* before, int64_t ld) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i + kMany * W <= ld; i += kMany * W) {
    const Many<A> s = slope<kActivation>(map<A>([&](int v) { return load(before + i + v * W); }));
#pragma GCC unroll 4
    for (int v = 0; v < kMany; ++v) {
      A* at = sums + i + v * W;
      store(at, load(at) * s.v[v]);
    }
  }
}

// sums [rows, made_stride]: of each group the gradients of its places, scaled, through the
// activation. Lanes past the features are zero.
template <class S, class C, class A>
void sum_places(const LowRank& p, const LowRankGrad& g, const A* packed, int64_t begin, int64_t end,
                A* sums, A* before, A* panels) {
  const int64_t ld = made_stride<A>(p.features);
  for (int64_t group = begin; group < end; ++group) {
    A* to = sums + (group - begin) * ld;
    bool first = true;
    each_place(p, group, [&](int64_t place) {
      const S* from = static_cast<const S*>(g.grad) + place * g.grad_stride;
      const auto given = [&](int64_t i, auto kind) { return read(kind, from + i); };
      const auto more = [&](int64_t i, auto kind) { return read(kind, to + i) + given(i, kind); };
      if (first) {
        write_row<false>(to, p.features, given);
      } else {
        write_row<false>(to, p.features, more);
      }
      first = false;
    });
    memset(to + p.features, 0, (ld - p.features) * sizeof(A));
    if (g.count) {
      const A scale = A(1) / A(g.count[group]);
      for (int64_t i = 0; i < p.features; ++i) to[i] *= scale;
    }
  }
  if (!p.activation) return;
  make_rows<S, C>(p, kIdentity, packed, begin, end, before, panels);
  for (int64_t r = 0; r < end - begin; ++r) {
    A *to = sums + r * ld, *z = before + r * ld;
    if (p.activation == kRelu) times_slope<kRelu>(to, z, ld);
    if (p.activation == kGelu) times_slope<kGelu>(to, z, ld);
    if (p.activation == kElu) times_slope<kElu>(to, z, ld);
  }
}

// Brings rows of the gradient that are summed next into L2, a share of each while others are
// multiplied.
template <class S>
struct Fetch {
  Fetch(const LowRank& p, const LowRankGrad& g, int64_t begin, int64_t end)
      : grad(static_cast<const S*>(g.grad)), stride(g.grad_stride) {
    if (begin == end) return;
    positions = p.positions + p.pieces[begin].begin;
    count = min_of(int64_t(p.pieces[end - 1].end - p.pieces[begin].begin), kFetched);
  }

  void columns(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = begin; c < end; c += 64 / sizeof(S))
        __builtin_prefetch(grad + positions[i] * stride + c, 0, 2);
  }

 private:
  const S* grad;
  int64_t stride, count = 0;
  const uint32_t* positions = nullptr;
};

template <class S, class C>
void grad_of(const LowRank& p, const LowRankGrad& g, const void* packed, const void* grad_packed,
             int64_t begin, int64_t end, int64_t next, bool adds, void* decoder, void* bias,
             void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>, N = kStrip<A>;
  const int64_t ld = made_stride<A>(p.features), rank = padded_rank<A>(p.rank), rows = end - begin;
  A* sums = static_cast<A*>(scratch);
  A* before = sums + rows * ld;
  A* codes = before + (p.activation ? rows * ld : 0);
  sum_places<S, C>(p, g, static_cast<const A*>(packed), begin, end, sums, before, codes);
  if (bias)
    for (int64_t i = 0; i < ld; i += W) {
      A* to = static_cast<A*>(bias) + i;
      Vec<A> sum = adds ? load(to) : Vec<A>{};
      for (int64_t r = 0; r < rows; ++r) sum += load(sums + r * ld + i);
      store(to, sum);
    }
  if (g.codes) {
    const Panels cut(rows, kWideRows);
    const A* w = static_cast<const A*>(grad_packed);
    for (int64_t k = 0; k < rank; k += N, w += p.features * N) {
      const bool wide = rank - k >= N;
      const int64_t strip = wide ? N : W;
      // A block of the decoder stays in L1 for all rows.
      for (int64_t o = 0; o < p.features; o += kBlock)
        for (int64_t i = 0, at = 0; i < cut.count; ++i) {
          const int64_t height = cut.height + (i < cut.taller);
          const auto tile = wide ? rows_tile_for<A, 2>(height) : rows_tile_for<A, 1>(height);
          tile(sums + at * ld + o, ld, w + o * strip, strip, min_of(kBlock, p.features - o), o > 0,
               static_cast<A*>(g.codes) + (begin + at) * rank + k, rank);
          at += height;
        }
    }
  }
  if (decoder) {
    gather_rows<C>(p, begin, end, codes);
    const Panels cut(p.rank, kWideRows);
    const Fetch<S> fetch(p, g, end, next);
    for (int64_t o = 0; o < p.features; o += N) {
      fetch.columns(o, min_of(o + N, p.features));
      for (int64_t i = 0, k = 0; i < cut.count; ++i) {
        const int64_t height = cut.height + (i < cut.taller);
        multiply(tile_for<A, 2>(height), codes + k, rank, sums + o, ld, rows,
                 static_cast<const A*>(nullptr), adds, static_cast<A*>(decoder) + k * ld + o, ld);
        k += height;
      }
    }
  }
}

template <class S>
void grad(const LowRank& p, const LowRankGrad& g, const void* packed, const void* grad_packed,
          int64_t begin, int64_t end, int64_t next, bool adds, void* decoder, void* bias,
          void* scratch) {
  const auto of = p.scales ? grad_of<S, int8_t> : grad_of<S, S>;
  of(p, g, packed, grad_packed, begin, end, next, adds, decoder, bias, scratch);
}

template <class S>
void sum(const void* rows, int64_t count, int64_t stride, int64_t cols, void* to) {
  using A = typename Accumulator<S>::type;
  const A* from = static_cast<const A*>(rows);
  write_row<false>(static_cast<S*>(to), cols, [&](int64_t i, auto kind) {
    auto total = read(kind, from + i);
    for (int64_t b = 1; b < count; ++b) total += read(kind, from + b * stride + i);
    return total;
  });
}

template <class S>
void sum_decoders(const LowRank& p, const void* blocks, int64_t count, int64_t begin, int64_t end,
                  void* to) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const int64_t ld = made_stride<A>(p.features), rank = p.rank;
  for (int64_t o = begin; o < end; o += W)
    for (int64_t k = 0; k < rank; k += W) {
      Vec<A> v[W];
      for (int i = 0; i < W; ++i) {
        const A* from = static_cast<const A*>(blocks) + min_of(k + i, rank - 1) * ld + o;
        v[i] = load(from);
        for (int64_t b = 1; b < count; ++b) v[i] += load(from + b * rank * ld);
      }
      transpose<A>(v);
      for (int i = 0; i < min_of<int64_t>(W, end - o); ++i) {
        S* row = static_cast<S*>(to) + (o + i) * rank + k;
        if (rank - k >= W) {
          store_narrow(row, v[i]);
        } else {
          for (int64_t c = 0; c < rank - k; ++c) narrow(v[i][c], row + c);
        }
      }
    }
}

}  // namespace
}  // namespace lean_kernels

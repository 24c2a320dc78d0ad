// SPDX-License-Identifier: Apache-2.0
// Rows of low_rank_embedding made and written, for one instruction set.
#pragma once

#include <type_traits>

#include "low_rank_tiles.h"

namespace lean_kernels {
namespace {

template <class A, class C>
LK_INLINE Vec<A> load_code(const C* p, A scale) {
  if constexpr (sizeof(C) == 1) {
    return load_bytes<A>(p) * scale;
  } else {
    return load_wide(p);
  }
}

template <class A, class C>
LK_INLINE A one_code(const C* p, A scale) {
  if constexpr (sizeof(C) == 1) {
    return A(*p) * scale;
  } else {
    return widen(*p);
  }
}

template <class C>
LK_INLINE const C* code_row(const LowRank& p, int64_t group) {
  return static_cast<const C*>(p.codes) + p.pieces[group].id * p.code_stride;
}
template <class A>
LK_INLINE A code_scale(const LowRank& p, int64_t group) {
  return p.scales ? A(p.scales[p.pieces[group].id]) : A(1);
}

struct FetchNoCodes {
  LK_INLINE void operator()() {}
};

// row(i), of `rank` codes to be multiplied by scale(i), for i in [0, rows), as [rank][rows]. May
// write a vector past the end. `fetch()` is called beside each load.
template <class A, class Row, class Scale, class Fetch = FetchNoCodes>
LK_INLINE void transpose_codes(int64_t rank, int64_t rows, Row row, Scale scale, A* to,
                               Fetch fetch = {}) {
  constexpr int W = kLanes<A>;
  for (int64_t at_k = 0; at_k < rank; at_k += W) {
    // The last vector is one with some before it, where there are enough.
    const int64_t k = rank < W ? 0 : min_of(at_k, rank - W);
    for (int64_t at = (rows - 1) / W * W; at >= 0; at -= W) {
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t r = min_of(at + i, rows - 1);
        const auto* from = row(r) + k;
        fetch();
        if (rank >= W) {
          v[i] = load_code<A>(from, scale(r));
        } else {
          A lanes[W] = {};
          for (int64_t c = 0; c < rank; ++c) lanes[c] = one_code<A>(from + c, scale(r));
          v[i] = load(lanes);
        }
      }
      transpose<A>(v);
      // Lanes past the last row are overwritten by the next column's.
      for (int i = 0; i < min_of<int64_t>(W, rank); ++i) store(to + (k + i) * rows + at, v[i]);
    }
  }
}

// Codes of groups [begin, begin + rows) as [rank][rows], rows at most a tile's. May write a vector
// past the end. Fetches those of the next panel.
template <class C, class A>
void gather_panel(const LowRank& p, int64_t begin, int64_t rows, int64_t end, A* panel) {
  for (int64_t r = begin + rows; r < min_of(begin + 2 * rows, end); ++r)
    for (int64_t k = 0; k < p.rank; k += 64 / sizeof(C)) __builtin_prefetch(code_row<C>(p, r) + k);
  transpose_codes(
      p.rank, rows, [&](int64_t r) { return code_row<C>(p, begin + r); },
      [&](int64_t r) { return code_scale<A>(p, begin + r); }, panel);
}

// Codes of groups [begin, end) as rows, padded with zeros.
template <class C, class A>
void gather_rows(const LowRank& p, int64_t begin, int64_t end, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t g = begin; g < end; ++g, to += padded_rank<A>(p.rank)) {
    const C* from = code_row<C>(p, g);
    const A scale = code_scale<A>(p, g);
    int64_t k = 0;
    for (; k + W <= p.rank; k += W) store(to + k, load_code<A>(from + k, scale));
    for (; k < p.rank; ++k) to[k] = one_code<A>(from + k, scale);
    for (; k < padded_rank<A>(p.rank); ++k) to[k] = 0;
  }
}

// Strips of the decoder as [strip][rank][kStrip], features past the last zero.
template <class S>
void pack(const LowRank& p, int64_t begin, int64_t end, void* packed) {
  using A = typename Accumulator<S>::type;
  constexpr int N = kStrip<A>;
  A* to = static_cast<A*>(packed) + begin * p.rank * N;
  const S* from = static_cast<const S*>(p.decoder) + begin * N * p.decoder_out;
  const int64_t whole = min_of(end, p.features / N) - begin;
  if (whole > 0) {
    const BlockMatrix w{from, nullptr, nullptr, nullptr,       1,           whole * N, p.rank,
                        0,    p.decoder_out, p.decoder_in};
    pack_blocks<S>(w, 0, 1, N, to);
  }
  if (begin + whole == end) return;
  from += whole * N * p.decoder_out;
  to += whole * N * p.rank;
  for (int64_t k = 0; k < p.rank; ++k)
    for (int64_t c = 0; c < N; ++c)
      to[k * N + c] = (begin + whole) * N + c < p.features
                          ? widen(from[c * p.decoder_out + k * p.decoder_in])
                          : A(0);
}

// activation(codes decoderᵀ + bias) of pieces [begin, end), a tile [height, kStrip] at a time: that
// of pieces from begin + at on and features from o on goes to out(at, o), its rows ld apart, and
// done(at, height, o) is called. What that leaves in `side` is done along with the next tile.
template <class S, class C, class A, class Side, class Out, class Done>
LK_INLINE void make_tiles(const LowRank& p, int activation, const A* packed, int64_t begin,
                          int64_t end, A* panels, int64_t ld, Side& side, Out out, Done done) {
  constexpr int N = kStrip<A>;
  const Panels cut(end - begin, kWideRows);
  const auto taller = tile_for<A, 2, Side>(cut.height + 1), rest = tile_for<A, 2, Side>(cut.height);
  const auto each_panel = [&](auto f) {
    for (int64_t i = 0, at = 0; i < cut.count; ++i) {
      const int64_t height = cut.height + (i < cut.taller);
      f(at, height, i < cut.taller ? taller : rest);
      at += height;
    }
  };
  each_panel([&](int64_t at, int64_t height, Tile<A, Side>) {
    gather_panel<C>(p, begin + at, height, end, panels + at * p.rank);
  });
  for (int64_t o = 0; o < p.features; o += N, packed += p.rank * N) {
    A bias[N] = {};
    if (p.bias)
      for (int64_t c = 0; c < min_of<int64_t>(N, p.features - o); ++c)
        bias[c] = widen(static_cast<const S*>(p.bias)[o + c]);
    each_panel([&](int64_t at, int64_t height, Tile<A, Side> tile) {
      A* to = out(at, o);
      multiply(tile, panels + at * p.rank, height, packed, N, p.rank, bias, false, to, ld, side);
      if (activation) finish<A, A>(activation, to, ld, int(height), N, nullptr, 0, to, ld);
      done(at, height, o);
    });
  }
  side.finish();
}

// made [end - begin, made_stride] = the rows of pieces [begin, end).
template <class S, class C, class A>
void make_rows(const LowRank& p, int activation, const A* packed, int64_t begin, int64_t end,
               A* made, A* panels) {
  const int64_t ld = made_stride<A>(p.features);
  Idle side;
  make_tiles<S, C>(
      p, activation, packed, begin, end, panels, ld, side,
      [&](int64_t at, int64_t o) { return made + at * ld + o; },
      [](int64_t, int64_t, int64_t) {});
}

template <class F>
LK_INLINE void each_place(const LowRank& p, int64_t piece, F f) {
  const uint32_t end = p.pieces[piece].end;
  for (uint32_t at = p.pieces[piece].begin; at < end; ++at) f(p.positions ? p.positions[at] : at);
}

template <bool streamed, class S, class A>
LK_INLINE void copy_all(const Copy<S, A>* copies, int64_t count, int64_t o, int64_t features) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = [&](int64_t c, auto kind) { return read(kind, copies[i].from + c); };
    write_row<streamed>(copies[i].to + o, features, value);
  }
}

// Rows without an end, written strip by strip while later ones are multiplied.
template <bool streamed, class S, class C, class A>
void plain_rows(const LowRank& p, const EmbeddingRows& end_of_row, const A* packed, int64_t begin,
                int64_t end, void* scratch) {
  constexpr int N = kStrip<A>;
  const uint32_t first = p.pieces[begin].begin;
  A* made = static_cast<A*>(scratch);
  A* panels = made + (end - begin) * N;
  A* after = panels + round_up((end - begin) * p.rank + kLanes<A>, N);
  // A list, since how often a row occurs is not predictable.
  auto* copies = reinterpret_cast<Copy<S, A>*>(after);
  for (int64_t g = begin, i = 0; g < end; ++g)
    each_place(p, g, [&](int64_t place) {
      copies[i++] = {made + (g - begin) * N,
                     static_cast<S*>(end_of_row.out) + place * end_of_row.stride};
    });
  constexpr bool kBesides = std::is_same_v<S, A>;
  std::conditional_t<kBesides, Copies<A, streamed>, Idle> side;
  make_tiles<S, C>(
      p, p.activation, packed, begin, end, panels, N, side,
      [&](int64_t at, int64_t) { return made + at * N; },
      [&](int64_t at, int64_t height, int64_t o) {
        const Piece* piece = p.pieces + begin + at;
        const auto* from = copies + (piece->begin - first);
        const int64_t count = piece[height - 1].end - piece->begin;
        if constexpr (kBesides) side = {};
        if (p.features - o < N) {
          copy_all<streamed>(from, count, o, p.features - o);
        } else if constexpr (kBesides) {
          side = {from, count, o, min_of(kChain, p.rank)};
        } else {
          copy_all<streamed>(from, count, o, N);
        }
      });
}

template <class S, class C>
void rows_of(const LowRank& p, const EmbeddingRows& end_of_row, const void* packed, int64_t begin,
             int64_t end, void* scratch) {
  using A = typename Accumulator<S>::type;
  const A* weights = static_cast<const A*>(packed);
  // What is streamed must be whole cache lines.
  constexpr bool kLines = kStrip<A> * sizeof(S) % 64 == 0;
  if (end_of_row.plain() && end_of_row.stream && kLines) {
    plain_rows<true, S, C>(p, end_of_row, weights, begin, end, scratch);
  } else if (end_of_row.plain() && !end_of_row.stream) {
    plain_rows<false, S, C>(p, end_of_row, weights, begin, end, scratch);
  } else {
    const int64_t ld = made_stride<A>(p.features);
    A* made = static_cast<A*>(scratch);
    A* finished = made + (end - begin) * ld;
    make_rows<S, C>(p, p.activation, weights, begin, end, made, finished + ld);
    int64_t before = -1;
    const A* row = made;
    for (int64_t g = begin; g < end; ++g)
      each_place(p, g, [&](int64_t place) {
        if (before >= 0) finish_row<S>(end_of_row, before, row, finished, place);
        before = place;
        row = made + (g - begin) * ld;
      });
    finish_row<S>(end_of_row, before, row, finished, before);
  }
  end_of_stores();
}

template <class S>
void rows(const LowRank& p, const EmbeddingRows& end_of_row, const void* packed, int64_t begin,
          int64_t end, void* scratch) {
  if (p.scales) return rows_of<S, int8_t>(p, end_of_row, packed, begin, end, scratch);
  return rows_of<S, S>(p, end_of_row, packed, begin, end, scratch);
}

}  // namespace
}  // namespace lean_kernels

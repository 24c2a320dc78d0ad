// SPDX-License-Identifier: Apache-2.0
// low_rank_embedding and its gradient, for one instruction set.
//
// Every output is one sum over the rank in order, started from the bias, whatever the height of the
// tile it is computed in: a row depends neither on the rest of the batch nor on threads.
#include "../low_rank_embedding.h"

#include "../isa.h"
#include "block_sparse_parts.h"
#include "embedding_row.h"

namespace lean_kernels {
namespace {

constexpr int64_t kChain = 512;  // of float32 sums: rounding errors grow with the length of a chain
constexpr int64_t kBlock = 128;  // features of the decoder that stay in L1
constexpr int64_t kFetched = 96;  // rows of the gradient: they must fit L2

template <class A>
constexpr int64_t kLineOf = 64 / sizeof(A);
template <class A>
constexpr int kStrip = 2 * kLanes<A>;

LK_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// A line more than the features, so that rows do not all fall into the same sets of L1.
template <class A>
int64_t made_stride(int64_t features) {
  return round_up(features, 2 * kStrip<A>) + kLineOf<A>;
}
template <class A>
int64_t padded_rank(int64_t rank) {
  return round_up(rank, kLanes<A>);
}

// A row that is made, and one of the places it goes to.
template <class S, class A>
struct Copy {
  const A* from;
  S* to;
};

// What a tile does besides: nothing.
struct Idle {
  LK_INLINE void step() {}
  LK_INLINE void finish() {}
};

// What a tile does besides: copies of the strips before, spread over its depth. All at once they
// fill the queue of stores, and the processor waits for memory.
template <class A, bool streamed>
struct Copies {
  const Copy<A, A>* next = nullptr;
  const Copy<A, A>* end = nullptr;
  int64_t feature = 0, every = 0, wait = 0;

  Copies() = default;
  Copies(const Copy<A, A>* copies, int64_t count, int64_t o, int64_t depth)
      : next(copies), end(copies + count), feature(o), every(std::max<int64_t>(depth / count, 1)),
        wait(every) {}

  LK_INLINE void copy() {
    write_row<streamed>(next->to + feature, kStrip<A>,
                        [&](int64_t c, auto kind) { return read(kind, next->from + c); });
    ++next;
  }
  LK_INLINE void step() {
    if (--wait != 0 || next == end) return;
    wait = every;
    copy();
  }
  LK_INLINE void finish() {
    while (next != end) copy();
  }
};

// out [R, V vectors] (+)= x w, x [depth][rows] of unit stride between rows, w [depth][V vectors].
// The first `depth` starts from init, or from 0 without; `adds` keeps what out holds. `side` ends
// before out is written.
template <class A, int R, int V, class Side>
void tile_of(const A* x, int64_t x_step, const A* w, int64_t w_step, int64_t depth, const A* init,
             bool adds, A* out, int64_t ldo, Side side) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = init ? load(init + v * W) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k, x += x_step, w += w_step) {
    Vec<A> wk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) wk[v] = load(w + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A xs = x[r];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += wk[v] * xs;
    }
    side.step();
  }
  side.finish();
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * W;
      store(to, adds ? acc[r][v] + load(to) : acc[r][v]);
    }
}

template <class A, class Side = Idle>
using Tile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, const A*, bool, A*, int64_t,
                      Side);

template <class A, int V, class Side = Idle, int R = kWideRows>
Tile<A, Side> tile_for(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of<A, R, V, Side> : tile_for<A, V, Side, R - 1>(rows);
  }
}

// The same with x [rows][depth], rows x_row apart.
template <class A, int R, int V>
void rows_tile_of(const A* x, int64_t x_row, const A* w, int64_t w_step, int64_t depth, bool adds,
                  A* out, int64_t ldo) {
  constexpr int W = kLanes<A>, kGroup = 3;  // rows that an address can tell apart
  Vec<A> acc[R][V] = {};
  const A* group[ceil_div(R, kGroup)];
  for (int i = 0; i < ceil_div(R, kGroup); ++i) group[i] = x + i * kGroup * x_row;
  for (int64_t k = 0; k < depth; ++k, w += w_step) {
    Vec<A> wk[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) wk[v] = load(w + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A xs = group[r / kGroup][r % kGroup * x_row + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += wk[v] * xs;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * W;
      store(to, adds ? acc[r][v] + load(to) : acc[r][v]);
    }
}

template <class A>
using RowsTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, bool, A*, int64_t);

template <class A, int V, int R = kWideRows>
RowsTile<A> rows_tile_for(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? rows_tile_of<A, R, V> : rows_tile_for<A, V, R - 1>(rows);
  }
}

// The same over any depth, in chains.
template <class A, class Side = Idle>
LK_INLINE void multiply(Tile<A, Side> tile, const A* x, int64_t x_step, const A* w, int64_t w_step,
                        int64_t depth, const A* init, bool adds, A* out, int64_t ldo,
                        Side side = {}) {
  for (int64_t k = 0; k < depth; k += kChain, init = nullptr, adds = true, side = {})
    tile(x + k * x_step, x_step, w + k * w_step, w_step, min_of(kChain, depth - k), init, adds, out,
         ldo, side);
}

template <class A, class C>
LK_INLINE Vec<A> load_code(const C* p, A scale) {
  if constexpr (sizeof(C) == 1) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes<A>)));
    Bytes bytes;
    memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Vec<A>) * scale;
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

// Codes of groups [begin, begin + rows) as [rank][rows], rows at most a tile's. May write a vector
// past the end. Fetches those of the next panel.
template <class C, class A>
void gather_panel(const LowRank& p, int64_t begin, int64_t rows, int64_t end, A* panel) {
  constexpr int W = kLanes<A>;
  for (int64_t r = begin + rows; r < min_of(begin + 2 * rows, end); ++r)
    for (int64_t k = 0; k < p.rank; k += 64 / sizeof(C)) __builtin_prefetch(code_row<C>(p, r) + k);
  for (int64_t k = 0; k < p.rank; k += W) {
    const int64_t left = p.rank - k;
    for (int64_t at = (rows - 1) / W * W; at >= 0; at -= W) {
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t group = begin + min_of(at + i, rows - 1);
        const C* from = code_row<C>(p, group) + k;
        const A scale = code_scale<A>(p, group);
        if (left >= W) {
          v[i] = load_code<A>(from, scale);
        } else {
          A lanes[W] = {};
          for (int64_t c = 0; c < left; ++c) lanes[c] = one_code<A>(from + c, scale);
          v[i] = load(lanes);
        }
      }
      transpose<A>(v);
      // Lanes past the last row are overwritten by the next column's.
      for (int i = 0; i < min_of<int64_t>(W, left); ++i) store(panel + (k + i) * rows + at, v[i]);
    }
  }
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

// activation(codes decoderᵀ + bias) of pieces [begin, end), a tile [height, kStrip] at a time: that of
// pieces from begin + at on and features from o on goes to out(at, o), its rows ld apart, and
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
    for (int64_t g = begin; g < end; ++g)
      each_place(p, g, [&](int64_t place) {
        finish_row<S>(end_of_row, place, made + (g - begin) * ld, finished);
      });
  }
  end_of_stores();
}

template <class S>
void rows(const LowRank& p, const EmbeddingRows& end_of_row, const void* packed, int64_t begin,
          int64_t end, void* scratch) {
  if (p.scales) return rows_of<S, int8_t>(p, end_of_row, packed, begin, end, scratch);
  return rows_of<S, S>(p, end_of_row, packed, begin, end, scratch);
}

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
  return {sizes<S>, pack<S>, grad_pack<S>, rows<S>, grad<S>, sum<S>, sum_decoders<S>};
}

}  // namespace

const LowRankKernels LEAN_KERNELS_ISA::low_rank[kDtypes] = {
    low_rank_kernels<float>(), low_rank_kernels<BFloat16>(), low_rank_kernels<Float16>(),
    low_rank_kernels<double>()};

}  // namespace lean_kernels

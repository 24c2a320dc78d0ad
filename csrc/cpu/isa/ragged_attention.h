// SPDX-License-Identifier: Apache-2.0
// The inner loops of ragged_attention, for one instruction set.
//
// A task packs its keys into panels of one or two vectors of keys, element after element of the
// head, and its values into strips of columns. Then it takes its query rows in chunks: products
// with every key a row may see, softmax over the whole row, product with the values. A chunk's
// scores stay in cache for sequences of up to a few thousand keys, and nothing is ever computed
// twice, however long the sequence is. All sums run in an order that depends on the sequence alone.
#pragma once

#include "../ragged_attention.h"
#include "activations.h"
#include "tiles.h"

namespace lean_kernels {
namespace {

constexpr int64_t kChunkPanels = 8;                      // row panels per chunk
constexpr int64_t kChunkRows = kChunkPanels * kWideRows;  // query rows that share a pass over keys
constexpr int64_t kChunkBytes = 16 << 20;  // scores of a chunk; longer rows get fewer of them
constexpr int64_t kKeyBlock = 256;         // keys per pass over the values

LK_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
template <class T>
LK_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

// ---- softmax in base 2 --------------------------------------------------------------------------

// 2^x for x <= 0, relative error 1.6e-7; 0 below -125. NaN passes through.
LK_INLINE Vec<float> exp2_of(Vec<float> x) {
  const Vec<float> round = splat(0x1.8p23f), shifted = x + round, r = x - (shifted - round);
  Vec<float> p = r * splat(1.326472726e-03f) + splat(9.671512700e-03f);
  p = p * r + splat(5.550733744e-02f);
  p = p * r + splat(2.402224208e-01f);
  p = p * r + splat(6.931469776e-01f);
  p = p * r + splat(1.0f);
  const IntVec exponent = ((IntVec)shifted + 127) << 23;
  return x < splat(-125.0f) ? splat(0.0f) : p * (Vec<float>)exponent;
}
LK_INLINE Vec<double> exp2_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp2(x[i]);
  return x;
}

template <class A>
LK_INLINE Vec<A> lanes_from(int64_t first) {
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = A(first + i);
  return v;
}

// Which of the lanes at columns [at, at + W) lie in [span.begin, span.end): all bits set.
template <class A>
LK_INLINE auto lanes_inside(int64_t at, Span span) {
  constexpr int64_t W = kLanes<A>;
  const Vec<A> lane = lanes_from<A>(0);
  const A begin = A(max_of<int64_t>(span.begin - at, 0));
  const A end = A(max_of<int64_t>(min_of(span.end - at, W), 0));
  return (lane >= splat(begin)) & (lane < splat(end));
}

template <class A>
LK_INLINE A max_lane(Vec<A> v) {
  A m = v[0];
  for (int i = 1; i < kLanes<A>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
template <class A>
LK_INLINE A sum_of_lanes(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int step = kLanes<A> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// Outside of `seen`, the columns of `span` (whole vectors) get `value`.
template <class A>
LK_INLINE void fill_outside(A* s, Span span, Span seen, A value) {
  constexpr int W = kLanes<A>;
  const auto fix = [&](int64_t j) {
    store(s + j, lanes_inside<A>(j, seen) ? load(s + j) : splat(value));
  };
  int64_t j = span.begin;
  for (; j < span.end && j < seen.begin; j += W) fix(j);
  j = max_of(j, seen.end / W * W);
  for (; j < span.end; j += W) fix(j);
}

// s [columns] <- 2^(s - largest) over `span`, 0 outside of `seen`. Returns the logarithm of the sum
// of 2^s, and its parts.
template <class A>
struct RowSum {
  A largest, sum;
};
template <class A>
LK_INLINE RowSum<A> exponentials(A* s, Span span, Span seen) {
  constexpr int W = kLanes<A>;
  const A lowest = -__builtin_inf();
  if (seen.begin > span.begin || seen.end < span.end) fill_outside<A>(s, span, seen, lowest);
  Vec<A> top[2] = {splat(lowest), splat(lowest)};
  int64_t j = span.begin;
  for (; j + 2 * W <= span.end; j += 2 * W)
    for (int i = 0; i < 2; ++i) {
      const Vec<A> v = load(s + j + i * W);
      top[i] = top[i] > v ? top[i] : v;
    }
  for (; j < span.end; j += W) {
    const Vec<A> v = load(s + j);
    top[0] = top[0] > v ? top[0] : v;
  }
  A largest = max_lane<A>(top[0] > top[1] ? top[0] : top[1]);
  const Vec<A> shift = splat(largest == lowest ? A(0) : largest);
  Vec<A> sums[4] = {};
  j = span.begin;
  for (; j + 4 * W <= span.end; j += 4 * W)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<A> v = exp2_of(load(s + j + i * W) - shift);
      sums[i] += v;
      store(s + j + i * W, v);
    }
  for (; j < span.end; j += W) {
    const Vec<A> v = exp2_of(load(s + j) - shift);
    sums[0] += v;
    store(s + j, v);
  }
  return {largest, sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]))};
}

// ---- packing ------------------------------------------------------------------------------------

// One row as accumulators, `width` >= dim of them, zeros past the end.
template <class S, class A>
LK_INLINE void pack_row(const S* from, int64_t dim, A* to, int64_t width) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load_wide(from + d));
  for (; d < dim; ++d) to[d] = widen(from[d]);
  for (; d < width; ++d) to[d] = 0;
}

// Rows of a panel as [dim][width], zeros past the last row.
template <class S, class A>
void pack_panel_of_keys(const S* from, int64_t ld, int64_t rows, int64_t dim, A* to,
                        int64_t width) {
  constexpr int W = kLanes<A>;
  for (int64_t lane = 0; lane < width; lane += W) {
    const int64_t here = max_of<int64_t>(min_of<int64_t>(rows - lane, W), 0);
    const S* first = from + lane * ld;
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      Vec<A> v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) v[r] = r < here ? load_wide(first + r * ld + d) : splat(A(0));
      transpose<A>(v);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (d + r) * width + lane, v[r]);
    }
    for (; d < dim; ++d)
      for (int r = 0; r < W; ++r)
        to[d * width + lane + r] = r < here ? A(widen(first[r * ld + d])) : A(0);
  }
}

// Keys [rows, dim] as panels of 2 W keys, the last one of W if they suffice: panel of key j at j * dim.
template <class S, class A>
void pack_keys(const S* from, int64_t ld, int64_t rows, int64_t dim, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t j = 0; j < rows; j += 2 * W)
    pack_panel_of_keys(from + j * ld, ld, min_of<int64_t>(rows - j, 2 * W), dim, to + j * dim,
                       rows - j > W ? 2 * W : W);
}

// Rows [rows, dim] as strips of 2 W columns, the last one of W if they suffice, zeros past the
// edge: strip of column c at c * rows.
template <class S, class A>
void pack_strips(const S* from, int64_t ld, int64_t rows, int64_t dim, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t c = 0; c < dim; c += 2 * W) {
    const int64_t width = dim - c > W ? 2 * W : W, here = min_of<int64_t>(dim - c, width);
    for (int64_t j = 0; j < rows; ++j) pack_row(from + j * ld + c, here, to + c * rows + j * width, width);
  }
}

// ---- register tiles -----------------------------------------------------------------------------

// out [R, V vectors] = multiplier * a [R, depth] b [depth, V vectors]
template <class A, int R, int V>
void tile_of_scores(const A* a, int64_t lda, const A* b, int64_t depth, A multiplier, A* out,
                    int64_t ldo) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = load(b + (k * V + v) * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A x = a[r * lda + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += w[v] * x;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v] * multiplier);
}

// out [R, V vectors] (+)= sum over k of a(r, k) b[k], where a(r, k) is a[r * lda + k], or
// a[r + k * lda] if kAcross.
template <class A, int R, int V, bool kAcross>
void tile_of_sums(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth, A* out,
                  int64_t ldo, bool add) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const A x = kAcross ? a[r + k * lda] : a[r * lda + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += w[v] * x;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * W;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
}

template <class A>
using ScoreTile = void (*)(const A*, int64_t, const A*, int64_t, A, A*, int64_t);
template <class A>
using SumTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, A*, int64_t, bool);

template <class A, int V, int R = kWideRows>
ScoreTile<A> score_tile(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of_scores<A, R, V> : score_tile<A, V, R - 1>(rows);
  }
}
template <class A, int V, bool kAcross, int R = kWideRows>
SumTile<A> sum_tile(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile_of_sums<A, R, V, kAcross> : sum_tile<A, V, kAcross, R - 1>(rows);
  }
}

// ---- a chunk of query rows ----------------------------------------------------------------------

struct RowPanel {
  int64_t begin, rows;
  Span keys;  // columns computed for these rows: whole vectors, a panel of keys at the start
};

// Rows of a task run over its heads first: row r is query row r % rows of head r / rows.
struct Chunk {
  int64_t begin, rows, panels;
  Span keys;                 // of all panels
  RowPanel panel[kChunkRows];
  Span seen[kChunkRows];     // keys each row sees
};

template <class A>
Chunk cut(const Attention& p, const AttentionTask& t, int64_t begin, int64_t rows) {
  constexpr int W = kLanes<A>;
  const int64_t task_rows = t.row_end - t.row_begin, keys = t.key_end - t.key_begin;
  const bool limited = p.left >= 0 || p.right >= 0;
  const Panels panels(rows, kWideRows);
  Chunk c;
  c.begin = begin, c.rows = rows, c.panels = panels.count;
  c.keys = {keys, 0};
  for (int64_t i = 0, at = 0; i < panels.count; ++i) {
    RowPanel& panel = c.panel[i];
    panel = {at, panels.height + (i < panels.taller), {keys, 0}};
    for (int64_t r = at; r < at + panel.rows; ++r) {
      Span seen{0, keys};
      if (limited) {
        const int64_t row = t.row_begin + (begin + r) % task_rows;
        seen = keys_within(p, t.sequence, row, p.left, p.right);
        seen = {seen.begin - t.key_begin, seen.end - t.key_begin};
        if (seen.begin >= seen.end) seen = {0, 0};
      }
      c.seen[r] = seen;
      if (seen.begin < seen.end) {
        panel.keys.begin = min_of(panel.keys.begin, seen.begin);
        panel.keys.end = max_of(panel.keys.end, seen.end);
      }
    }
    at += panel.rows;
    if (panel.keys.begin >= panel.keys.end) {
      panel.keys = {0, 0};
      continue;
    }
    panel.keys = {panel.keys.begin / (2 * W) * (2 * W), round_up(panel.keys.end, W)};
    c.keys.begin = min_of(c.keys.begin, panel.keys.begin);
    c.keys.end = max_of(c.keys.end, panel.keys.end);
  }
  if (c.keys.begin >= c.keys.end) c.keys = {0, 0};
  return c;
}

// Sizes of what a task keeps in scratch.
struct Sizes {
  int64_t keys, keys_padded, dim_padded, score_stride, chunk;

  template <class A>
  static Sizes of(const Attention& p, const AttentionTask& t) {
    constexpr int64_t W = kLanes<A>, kLine = 64 / sizeof(A);
    Sizes s;
    s.keys = t.key_end - t.key_begin;
    s.keys_padded = round_up(s.keys, W);
    s.dim_padded = round_up(p.dim, W);
    // An odd number of cache lines, so that rows do not fall onto the same ones.
    s.score_stride = (ceil_div(s.keys_padded, kLine) | 1) * kLine;
    const int64_t fitting = kChunkBytes / int64_t(sizeof(A)) / s.score_stride;
    s.chunk = max_of<int64_t>(min_of(fitting / kWideRows * kWideRows, kChunkRows), kWideRows);
    return s;
  }
};

// Cuts scratch into arrays, each on its own cache line.
template <class A>
struct Arena {
  A* next;
  A* take(int64_t count) {
    A* here = next;
    next += round_up(count, 64 / sizeof(A));
    return here;
  }
};

// products [rows, columns] = multiplier * rows · keys, for the columns each panel computes.
template <class A>
void multiply_keys(const Chunk& c, const A* rows, int64_t ld, const A* keys, int64_t key_count,
                   int64_t dim, A multiplier, A* products, int64_t stride) {
  constexpr int W = kLanes<A>;
  for (int64_t j = c.keys.begin; j < c.keys.end; j += 2 * W) {
    const bool wide = key_count - j > W;
    for (int64_t i = 0; i < c.panels; ++i) {
      const RowPanel& panel = c.panel[i];
      if (j < panel.keys.begin || j >= panel.keys.end) continue;
      const ScoreTile<A> tile = wide ? score_tile<A, 2>(panel.rows) : score_tile<A, 1>(panel.rows);
      tile(rows + panel.begin * ld, ld, keys + j * dim, dim, multiplier,
           products + panel.begin * stride + j, stride);
    }
  }
}

// sums [rows, dim_padded] = weights [rows, keys] · strips of [keys, dim].
template <class A>
void multiply_values(const Chunk& c, const A* weights, int64_t stride, const A* strips,
                     int64_t key_count, int64_t dim, A* sums, int64_t dim_padded) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < c.panels; ++i)
    if (c.panel[i].keys.begin >= c.panel[i].keys.end)
      for (int64_t r = 0; r < c.panel[i].rows; ++r)
        for (int64_t d = 0; d < dim_padded; ++d) sums[(c.panel[i].begin + r) * dim_padded + d] = 0;
  const int64_t all = min_of(c.keys.end, key_count);
  for (int64_t k = c.keys.begin; k < all; k += kKeyBlock)
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const bool wide = dim - d > W;
      const int64_t width = wide ? 2 * W : W;
      for (int64_t i = 0; i < c.panels; ++i) {
        const RowPanel& panel = c.panel[i];
        const int64_t begin = max_of(k, panel.keys.begin);
        const int64_t end = min_of(min_of(k + kKeyBlock, all), panel.keys.end);
        if (begin >= end) continue;
        const SumTile<A> tile =
            wide ? sum_tile<A, 2, false>(panel.rows) : sum_tile<A, 1, false>(panel.rows);
        tile(weights + panel.begin * stride + begin, stride, strips + d * key_count + begin * width,
             width, end - begin, sums + panel.begin * dim_padded + d, dim_padded,
             begin > panel.keys.begin);
      }
    }
}

template <class S, class A>
LK_INLINE void store_row(const A* sums, int64_t dim, A multiplier, S* to) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + W <= dim; d += W) store_narrow(to + d, load(sums + d) * multiplier);
  for (; d < dim; ++d) narrow(sums[d] * multiplier, to + d);
}

// ---- forward ------------------------------------------------------------------------------------

template <class S>
size_t forward_scratch(const Attention& p, const AttentionTask& t) {
  using A = typename Accumulator<S>::type;
  const Sizes z = Sizes::of<A>(p, t);
  return sizeof(A) * (z.keys_padded * p.dim + z.keys * z.dim_padded + z.chunk * p.dim +
                      z.chunk * z.score_stride + z.chunk * z.dim_padded +
                      p.group * z.keys_padded + 8 * 64);
}

// Adds each row's probabilities, weights[r] * factor[r], to its head's column sums.
template <class A>
void add_column_sums(const Chunk& c, int64_t rows_per_head, const A* weights, int64_t stride,
                     const A* factors, A* sums, int64_t sums_stride) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < c.panels; ++i) {
    const RowPanel& panel = c.panel[i];
    for (int64_t r = panel.begin, last = r + panel.rows; r < last;) {
      const int64_t head = (c.begin + r) / rows_per_head;
      const int64_t end = min_of(last, (head + 1) * rows_per_head - c.begin);
      A* to = sums + head * sums_stride;
      for (int64_t j = panel.keys.begin; j < panel.keys.end; j += W) {
        Vec<A> sum = {};
        for (int64_t k = r; k < end; ++k) sum += load(weights + k * stride + j) * factors[k];
        store(to + j, load(to + j) + sum);
      }
      r = end;
    }
  }
}

template <class S>
void forward(const Attention& p, const AttentionTask& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  const Sizes z = Sizes::of<A>(p, t);
  const Sequence& s = t.sequence;
  const int64_t task_rows = t.row_end - t.row_begin, all_rows = task_rows * p.group;
  Arena<A> arena{static_cast<A*>(scratch)};
  A* keys = arena.take(z.keys_padded * p.dim);
  A* values = arena.take(z.keys * z.dim_padded);
  A* packed = arena.take(z.chunk * p.dim);
  A* weights = arena.take(z.chunk * z.score_stride);
  A* sums = arena.take(z.chunk * z.dim_padded);
  A* column_sums = arena.take(p.group * z.keys_padded);

  const int64_t first_key = s.key + t.key_begin;
  pack_keys(static_cast<const S*>(p.key.data) + first_key * p.key.row + t.key_head * p.key.head,
            p.key.row, z.keys, p.dim, keys);
  pack_strips(
      static_cast<const S*>(p.value.data) + first_key * p.value.row + t.key_head * p.value.head,
      p.value.row, z.keys, p.dim, values);
  if (p.scores)
    for (int64_t i = 0; i < p.group * z.keys_padded; ++i) column_sums[i] = 0;

  const auto token_of = [&](int64_t r) { return s.query + t.row_begin + r % task_rows; };
  const auto head_of = [&](int64_t r) { return t.key_head * p.group + r / task_rows; };
  for (int64_t begin = 0; begin < all_rows; begin += z.chunk) {
    const Chunk c = cut<A>(p, t, begin, min_of(z.chunk, all_rows - begin));
    for (int64_t r = 0; r < c.rows; ++r)
      pack_row(static_cast<const S*>(p.query.data) + token_of(begin + r) * p.query.row +
                   head_of(begin + r) * p.query.head,
               p.dim, packed + r * p.dim, p.dim);
    multiply_keys(c, packed, p.dim, keys, z.keys, p.dim, A(p.scale * 1.4426950408889634), weights,
                  z.score_stride);
    A factors[kChunkRows];
    for (int64_t i = 0; i < c.panels; ++i)
      for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r) {
        const RowSum<A> row =
            exponentials<A>(weights + r * z.score_stride, c.panel[i].keys, c.seen[r]);
        factors[r] = row.sum == 0 ? A(0) : 1 / row.sum;
        static_cast<A*>(p.lse)[token_of(begin + r) * p.heads + head_of(begin + r)] =
            A(0.6931471805599453) * row.largest + A(::log(row.sum));
      }
    multiply_values(c, weights, z.score_stride, values, z.keys, p.dim, sums, z.dim_padded);
    for (int64_t r = 0; r < c.rows; ++r)
      store_row(sums + r * z.dim_padded, p.dim, factors[r],
                static_cast<S*>(p.out) +
                    (token_of(begin + r) * p.heads + head_of(begin + r)) * p.dim);
    if (!p.scores) continue;
    if (p.exclude_diagonal)
      for (int64_t r = 0; r < c.rows; ++r) {
        const Span own = keys_within(p, s, t.row_begin + (begin + r) % task_rows, 0, 0);
        for (int64_t j = max_of(own.begin, t.key_begin); j < min_of(own.end, t.key_end); ++j)
          weights[r * z.score_stride + j - t.key_begin] = 0;
      }
    add_column_sums(c, task_rows, weights, z.score_stride, factors, column_sums, z.keys_padded);
  }
  if (p.scores)
    for (int64_t h = 0; h < p.group; ++h) {
      A* to = static_cast<A*>(p.scores) + (t.key_head * p.group + h) * p.scores_head + t.scores_at;
      for (int64_t j = 0; j < s.keys; ++j)
        to[j] = j < t.key_begin || j >= t.key_end
                    ? A(0)
                    : column_sums[h * z.keys_padded + j - t.key_begin];
    }
}

// ---- gradients ----------------------------------------------------------------------------------

template <class S>
size_t grad_scratch(const Attention& p, const AttentionTask& t) {
  using A = typename Accumulator<S>::type;
  const Sizes z = Sizes::of<A>(p, t);
  return sizeof(A) * (2 * z.keys_padded * p.dim + 3 * z.keys * z.dim_padded +
                      3 * z.chunk * z.dim_padded + 2 * z.chunk * z.score_stride +
                      p.group * z.keys_padded + 10 * 64);
}

// to [keys, dim_padded] += weights [rows, keys]ᵀ · rows [rows, dim_padded], over the chunk's keys.
template <class A>
void add_transposed(const Chunk& c, const A* weights, int64_t stride, const A* rows, int64_t dim,
                    int64_t dim_padded, int64_t key_count, A* to) {
  constexpr int W = kLanes<A>;
  const int64_t begin = c.keys.begin, count = min_of(c.keys.end, key_count) - begin;
  if (count <= 0) return;
  const Panels panels(count, kWideRows);
  for (int64_t d = 0; d < dim; d += 2 * W) {
    const bool wide = dim - d > W;
    for (int64_t i = 0, j = begin; i < panels.count; ++i) {
      const int64_t height = panels.height + (i < panels.taller);
      const SumTile<A> tile = wide ? sum_tile<A, 2, true>(height) : sum_tile<A, 1, true>(height);
      tile(weights + j, stride, rows + d, dim_padded, c.rows, to + j * dim_padded + d, dim_padded,
           true);
      j += height;
    }
  }
}

template <class S>
void grad(const Attention& p, const AttentionTask& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const Sizes z = Sizes::of<A>(p, t);
  const Sequence& s = t.sequence;
  const int64_t task_rows = t.row_end - t.row_begin, all_rows = task_rows * p.group;
  const int64_t padded = z.dim_padded, stride = z.score_stride;
  Arena<A> arena{static_cast<A*>(scratch)};
  A* keys = arena.take(z.keys_padded * p.dim);     // panels of keys
  A* values = arena.take(z.keys_padded * p.dim);   // and of values
  A* strips = arena.take(z.keys * padded);         // keys again, in strips
  A* grad_keys = arena.take(z.keys * padded);      // rows
  A* grad_values = arena.take(z.keys * padded);
  A* queries = arena.take(z.chunk * padded);
  A* upstream = arena.take(z.chunk * padded);
  A* sums = arena.take(z.chunk * padded);
  A* weights = arena.take(z.chunk * stride);       // probabilities
  A* slopes = arena.take(z.chunk * stride);        // their gradients, then those of the logits
  A* of_scores = arena.take(p.group * z.keys_padded);

  const int64_t first_key = s.key + t.key_begin;
  const S* key = static_cast<const S*>(p.key.data) + first_key * p.key.row +
                 t.key_head * p.key.head;
  pack_keys(key, p.key.row, z.keys, p.dim, keys);
  pack_strips(key, p.key.row, z.keys, p.dim, strips);
  pack_keys(static_cast<const S*>(p.value.data) + first_key * p.value.row +
                t.key_head * p.value.head,
            p.value.row, z.keys, p.dim, values);
  for (int64_t i = 0; i < z.keys * padded; ++i) grad_keys[i] = grad_values[i] = 0;
  if (p.grad_scores.data) {
    const double share = p.mean ? 1.0 / (double(s.rows) * p.score_heads) : 1.0;
    for (int64_t h = 0; h < p.group; ++h)
      for (int64_t j = 0; j < z.keys_padded; ++j)
        of_scores[h * z.keys_padded + j] =
            j < z.keys ? A(static_cast<const A*>(p.grad_scores.data)
                                   [(first_key + j) * p.grad_scores.row +
                                    (t.key_head * p.group + h) * p.grad_scores.head] *
                           share)
                       : A(0);
  }

  const auto token_of = [&](int64_t r) { return s.query + t.row_begin + r % task_rows; };
  const auto head_of = [&](int64_t r) { return t.key_head * p.group + r / task_rows; };
  for (int64_t begin = 0; begin < all_rows; begin += z.chunk) {
    const Chunk c = cut<A>(p, t, begin, min_of(z.chunk, all_rows - begin));
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t token = token_of(begin + r), head = head_of(begin + r);
      pack_row(static_cast<const S*>(p.query.data) + token * p.query.row + head * p.query.head,
               p.dim, queries + r * padded, padded);
      pack_row(static_cast<const S*>(p.grad_out.data) + token * p.grad_out.row +
                   head * p.grad_out.head,
               p.dim, upstream + r * padded, padded);
    }
    multiply_keys(c, queries, padded, keys, z.keys, p.dim, A(p.scale * 1.4426950408889634), weights,
                  stride);
    multiply_keys(c, upstream, padded, values, z.keys, p.dim, A(1), slopes, stride);
    for (int64_t i = 0; i < c.panels; ++i)
      for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r) {
        const Span span = c.panel[i].keys, seen = c.seen[r];
        A* w = weights + r * stride;
        A* g = slopes + r * stride;
        // Where the panel computed nothing, both count as zero for the keys' gradients.
        for (int64_t j = c.keys.begin; j < c.keys.end; j += W)
          if (j < span.begin || j >= span.end) {
            store(w + j, splat(A(0)));
            store(g + j, splat(A(0)));
          }
        if (span.begin >= span.end) continue;
        fill_outside<A>(g, span, seen, A(0));
        if (p.grad_scores.data) {
          Span own{0, 0};
          if (p.exclude_diagonal) {
            own = keys_within(p, s, t.row_begin + (begin + r) % task_rows, 0, 0);
            own = {own.begin - t.key_begin, own.end - t.key_begin};
          }
          const A* add = of_scores + (begin + r) / task_rows * z.keys_padded;
          for (int64_t j = span.begin; j < span.end; j += W) {
            const Vec<A> more = lanes_inside<A>(j, own) ? splat(A(0)) : load(add + j);
            store(g + j, load(g + j) + more);
          }
        }
        const RowSum<A> row = exponentials<A>(w, span, seen);
        const Vec<A> factor = splat(row.sum == 0 ? A(0) : 1 / row.sum);
        Vec<A> dot = {};
        for (int64_t j = span.begin; j < span.end; j += W) {
          const Vec<A> probability = load(w + j) * factor;
          store(w + j, probability);
          dot += probability * load(g + j);
        }
        const Vec<A> mean = splat(sum_of_lanes<A>(dot)), scale = splat(A(p.scale));
        for (int64_t j = span.begin; j < span.end; j += W)
          store(g + j, load(w + j) * (load(g + j) - mean) * scale);
      }
    multiply_values(c, slopes, stride, strips, z.keys, p.dim, sums, padded);
    for (int64_t r = 0; r < c.rows; ++r)
      store_row(sums + r * padded, p.dim, A(1),
                static_cast<S*>(p.grad_query) +
                    (token_of(begin + r) * p.heads + head_of(begin + r)) * p.dim);
    add_transposed(c, slopes, stride, queries, p.dim, padded, z.keys, grad_keys);
    add_transposed(c, weights, stride, upstream, p.dim, padded, z.keys, grad_values);
  }
  const int64_t key_heads = p.heads / p.group;
  for (int64_t j = 0; j < z.keys; ++j) {
    const int64_t to = ((first_key + j) * key_heads + t.key_head) * p.dim;
    store_row(grad_keys + j * padded, p.dim, A(1), static_cast<S*>(p.grad_key) + to);
    store_row(grad_values + j * padded, p.dim, A(1), static_cast<S*>(p.grad_value) + to);
  }
}

template <class S>
constexpr AttentionKernels attention_kernels() {
  return {forward_scratch<S>, forward<S>, grad_scratch<S>, grad<S>};
}

}  // namespace
}  // namespace lean_kernels

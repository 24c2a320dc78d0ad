// SPDX-License-Identifier: Apache-2.0
// The inner loops of ragged_attention, for one instruction set.
//
// A task packs its keys into panels of one or two vectors of keys, element after element of the
// head, and its values into strips of columns. Then it takes its query rows in chunks: products
// with every key a row may see, softmax over the whole row, product with the values. A chunk's
// scores stay in cache for sequences of up to a few thousand keys, and nothing is ever computed
// twice, however long the sequence is. All sums run in an order that depends on the sequence alone.
#include "../isa.h"

#include "../ragged_attention.h"
#include "activations.h"
#include "tiles.h"

namespace lean_kernels {
namespace {

// Panels of query rows that share a pass over the keys: few keep a chunk's scores in L1 or L2, many
// spare passes over the gradients of keys and values.
constexpr int64_t kForwardPanels = 4, kGradPanels = 8;
constexpr int64_t kChunkPanels = kGradPanels, kChunkRows = kChunkPanels * kWideRows;
constexpr int64_t kChunkBytes = 16 << 20;  // scores of a chunk; longer rows get fewer of them
constexpr int64_t kKeyBlock = 256;         // keys per pass over the values
// The rows of longer sequences would not stay in L2; processors with AVX-512 have a large one.
constexpr int64_t kMostPrefetchedKeys = kVectorBytes == 64 ? 512 : 256;
constexpr int64_t kRowsAhead = 16;            // asked for while packing

LK_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
template <class T>
LK_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
// For this one GCC makes a comparison and a blend of the above.
LK_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
#endif

// ---- softmax in base 2 --------------------------------------------------------------------------

// x <- 2^x for x <= 0, relative error 1.6e-7; 0 below -126.5. NaN passes through. Step by step for
// all vectors, since a processor's schedulers do not look far enough ahead to mix whole chains.
template <int count>
LK_INLINE void exp2_each(Vec<float> (&x)[count]) {
  // Adding `round` leaves the nearest integer, plus the bias of an exponent, in the mantissa's low
  // bits; shifted into the exponent's place, -127 makes a zero.
  const Vec<float> round = splat(0x1.8p23f + 127), least = splat(-127.0f);
  Vec<float> shifted[count], r[count], p[count];
  const auto each = [](auto f) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) f(i);
  };
  each([&](int i) { x[i] = max_of(least, x[i]); });
  each([&](int i) { shifted[i] = x[i] + round; });
  each([&](int i) { r[i] = shifted[i] - round; });
  each([&](int i) { r[i] = x[i] - r[i]; });
  each([&](int i) { p[i] = r[i] * splat(1.326472726e-03f) + splat(9.671512700e-03f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(5.550733744e-02f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(2.402224208e-01f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(6.931469776e-01f); });
  each([&](int i) { p[i] = p[i] * r[i] + splat(1.0f); });
  each([&](int i) { x[i] = p[i] * (Vec<float>)((IntVec)shifted[i] << 23); });
}
template <int count>
LK_INLINE void exp2_each(Vec<double> (&x)[count]) {
  for (Vec<double>& v : x) {
    double lanes[kLanes<double>];
    store(lanes, v);
    for (double& lane : lanes) lane = ::exp2(lane);
    v = load(lanes);
  }
}

// ln x for x >= 1, absolute error 5e-8 + half a unit; 0 gives -inf, NaN stays.
LK_INLINE Vec<float> log_of(Vec<float> x) {
  const IntVec bits = (IntVec)x, shift = (bits - 0x3f3504f3) >> 23;  // x = m 2^shift, m near 1
  const Vec<float> f = (Vec<float>)(bits - (shift << 23)) - splat(1.0f);
  Vec<float> p = f * splat(8.700439029e-02f) + splat(-1.426748956e-01f);
  p = p * f + splat(1.491476801e-01f);
  p = p * f + splat(-1.657758440e-01f);
  p = p * f + splat(1.996306377e-01f);
  p = p * f + splat(-2.500133704e-01f);
  p = p * f + splat(3.333391074e-01f);
  p = p * f + splat(-0.5f);
  const Vec<float> exponent = __builtin_convertvector(shift, Vec<float>);
  const Vec<float> y = exponent * splat(0.693147181f) + (p * (f * f) + f);
  return x > splat(0.0f) ? y : (x == splat(0.0f) ? splat(-__builtin_inff()) : x);
}
LK_INLINE Vec<double> log_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

template <class A>
LK_INLINE Vec<A> lane_numbers() {
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = A(i);
  return v;
}

// Which of the columns [at, at + W) lie in the span: all bits set.
template <class A>
LK_INLINE auto lanes_inside(int64_t at, Span span) {
  constexpr int64_t W = kLanes<A>;
  const A begin = A(max_of<int64_t>(span.begin - at, 0));
  const A end = A(max_of<int64_t>(min_of(span.end - at, W), 0));
  return (lane_numbers<A>() >= splat(begin)) & (lane_numbers<A>() < splat(end));
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

// Count vectors of s become 2^(s - shift); adds them to sum.
template <int count, class A>
LK_INLINE void exponentiate(A* s, Vec<A> shift, Vec<A>& sum) {
  Vec<A> v[count] = {};
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) v[i] = load(s + i * kLanes<A>) - shift;
  exp2_each(v);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) store(s + i * kLanes<A>, v[i]);
#pragma GCC unroll 4
  for (int i = 1; i < count; ++i) v[0] += v[i];
  sum += v[0];
}

// ---- packing ------------------------------------------------------------------------------------

template <class S>
LK_INLINE void prefetch_row(const S* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + i, 0, 3);
}

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
  for (int64_t j = 0; j < rows; j += 2 * W) {
    for (int64_t i = j + kRowsAhead; i < min_of(j + kRowsAhead + 2 * W, rows); ++i)
      prefetch_row(from + i * ld, dim);
    pack_panel_of_keys(from + j * ld, ld, min_of<int64_t>(rows - j, 2 * W), dim, to + j * dim,
                       rows - j > W ? 2 * W : W);
  }
}

// Rows [rows, dim] cut into strips of 2 W columns, the last one of W if they suffice. The strip of
// column c starts at data + c * step, and its rows are `ld` apart, or packed where ld is 0.
template <class A>
struct Strips {
  const A* data;
  int64_t step, ld;
};

// Packs them, zeros past the edge.
template <class S, class A>
Strips<A> pack_strips(const S* from, int64_t ld, int64_t rows, int64_t dim, A* to) {
  constexpr int W = kLanes<A>;
  for (int64_t j = 0; j < rows; ++j, from += ld) {
    if (j + kRowsAhead < rows) prefetch_row(from + kRowsAhead * ld, dim);
    for (int64_t c = 0; c < dim; c += 2 * W) {
      const int64_t width = dim - c > W ? 2 * W : W;
      pack_row(from + c, min_of<int64_t>(dim - c, width), to + c * rows + j * width, width);
    }
  }
  return {to, rows, 0};
}

// Whether vectors may be read from and written to rows of storage as they are.
template <class S, class A>
bool whole_vectors(int64_t dim) {
  return sizeof(S) == sizeof(A) && dim % kLanes<A> == 0;
}

// ---- register tiles -----------------------------------------------------------------------------

// acc [R, V vectors] += sum over k of a(r, k) b[k], where a(r, k) is a[r * lda + k], or
// a[r + k * lda] if kAcross.
template <class A, int R, int V, bool kAcross>
LK_INLINE void accumulate(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth,
                          Vec<A> (&acc)[R][V]) {
  constexpr int W = kLanes<A>;
  // A pointer for every four rows. Left to itself, the compiler keeps a multiple of lda for each
  // row, more than there are registers.
  constexpr int kPointers = kAcross ? 1 : (R + 3) / 4;
  const A* at[kPointers];
#pragma GCC unroll 6
  for (int i = 0; i < kPointers; ++i) at[i] = a + 4 * i * lda;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = load(b + v * W);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const A x = kAcross ? at[0][r] : at[r / 4][r % 4 * lda];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += w[v] * x;
    }
    b += ldb;
#pragma GCC unroll 6
    for (int i = 0; i < kPointers; ++i) {
      at[i] += kAcross ? lda : 1;
      asm("" : "+r"(at[i]));
    }
  }
}

// out [R, V vectors] = multiplier * a [R, depth] b [depth, V vectors]
template <class A, int R, int V>
void tile_of_scores(const A* a, int64_t lda, const A* b, int64_t depth, A multiplier, A* out,
                    int64_t ldo) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
  accumulate<A, R, V, false>(a, lda, b, V * W, depth, acc);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * W, acc[r][v] * multiplier);
}

// out [R, V vectors] (+)= sum over k of a(r, k) b[k], as above; times factors[r] where there are
// any.
template <class A, int R, int V, bool kAcross>
void tile_of_sums(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t depth, A* out,
                  int64_t ldo, bool add, const A* factors) {
  constexpr int W = kLanes<A>;
  Vec<A> acc[R][V] = {};
  accumulate<A, R, V, kAcross>(a, lda, b, ldb, depth, acc);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ldo + v * W;
      if (factors) {
        store(to, acc[r][v] * factors[r]);
      } else {
        store(to, add ? load(to) + acc[r][v] : acc[r][v]);
      }
    }
}

template <class A>
using ScoreTile = void (*)(const A*, int64_t, const A*, int64_t, A, A*, int64_t);
template <class A>
using SumTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, A*, int64_t, bool,
                         const A*);

template <class A, int V, int R = V == 1 ? kNarrowRows : kWideRows>
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
  Span keys;      // columns computed for these rows: whole vectors, a panel of keys at the start
  bool one_head;  // their tokens follow one another
};

// Rows of a task run over its heads first: row r is query row r % rows of head r / rows.
struct Chunk {
  int64_t rows, panels;
  Span keys;  // of all panels
  bool limited;
  RowPanel panel[kChunkPanels];
  int64_t row[kChunkRows];   // of the sequence
  int64_t head[kChunkRows];  // of the task
  // Where limited: the keys each row sees, and the columns computed for it, its panel's.
  Span seen[kChunkRows], computed[kChunkRows];
};

// A task's rows, chunk after chunk.
struct Chunks {
  Panels panels;
  int64_t per_chunk;
  int64_t panel = 0, begin = 0;  // of the next chunk

  bool done() const { return panel == panels.count; }
};

template <class A>
void cut(const Attention& p, const AttentionTask& t, Chunks& all, Chunk& c) {
  constexpr int W = kLanes<A>;
  const int64_t task_rows = t.row_end - t.row_begin, keys = t.key_end - t.key_begin;
  c.panels = min_of(all.per_chunk, all.panels.count - all.panel);
  const int64_t taller = max_of<int64_t>(min_of(all.panels.taller - all.panel, c.panels), 0);
  c.rows = c.panels * all.panels.height + taller;
  c.limited = p.left >= 0 || p.right >= 0;
  for (int64_t r = 0, head = all.begin / task_rows, row = all.begin % task_rows; r < c.rows; ++r) {
    c.row[r] = t.row_begin + row;
    c.head[r] = head;
    if (++row == task_rows) row = 0, ++head;
  }
  all.panel += c.panels;
  all.begin += c.rows;
  c.keys = {keys, 0};
  for (int64_t i = 0, at = 0; i < c.panels; ++i) {
    RowPanel& panel = c.panel[i];
    const int64_t height = all.panels.height + (i < taller), end = at + height;
    panel = {at, height, {0, keys}, c.head[at] == c.head[end - 1]};
    if (c.limited) {
      panel.keys = {keys, 0};
      for (int64_t r = at; r < end; ++r) {
        const Span seen = keys_within(p, t.sequence, c.row[r], p.left, p.right);
        c.seen[r] = seen.begin < seen.end ? Span{seen.begin - t.key_begin, seen.end - t.key_begin}
                                          : Span{0, 0};
        if (seen.begin == seen.end) continue;
        panel.keys.begin = min_of(panel.keys.begin, c.seen[r].begin);
        panel.keys.end = max_of(panel.keys.end, c.seen[r].end);
      }
    }
    if (panel.keys.begin >= panel.keys.end) {
      panel.keys = {0, 0};
    } else {
      panel.keys = {panel.keys.begin / (2 * W) * (2 * W), round_up(panel.keys.end, W)};
      c.keys.begin = min_of(c.keys.begin, panel.keys.begin);
      c.keys.end = max_of(c.keys.end, panel.keys.end);
    }
    for (; c.limited && at < end; ++at) c.computed[at] = panel.keys;
    at = end;
  }
  if (c.keys.begin >= c.keys.end) c.keys = {0, 0};
}

// The same for up to four vectors.
template <class A>
LK_INLINE void exponentiate_last(A* s, int64_t count, Vec<A> shift, Vec<A>& sum) {
  switch (count) {
    case 1: return exponentiate<1>(s, shift, sum);
    case 2: return exponentiate<2>(s, shift, sum);
    case 3: return exponentiate<3>(s, shift, sum);
  }
}

// Rows s [rows, columns] of a chunk <- 2^(s - largest of the row) over the columns computed for
// each, 0 for keys the row does not see: those past `keys`, and where the chunk is limited those
// outside of its span. Gives the factor that normalises each row (0 where nothing is seen) and the
// natural logarithm of the sum of 2^s. `factors` and `lse` have room for whole vectors.
template <class A>
void softmax(const Chunk& c, A* s, int64_t stride, int64_t keys, A* factors, A* lse) {
  constexpr int W = kLanes<A>;
  const A lowest = -A(__builtin_inf());
  const int64_t tail = c.keys.end - W;  // with keys past the last
  const auto inside = lane_numbers<A>() < splat(A(keys - tail));
  for (int64_t begin = 0; begin < c.rows; begin += W) {
    const int64_t rows = min_of<int64_t>(W, c.rows - begin);
    Vec<A> top[W];
    for (int64_t r = 0; r < rows; ++r) {
      A* row = s + (begin + r) * stride;
      Span span = c.keys;
      if (c.limited) {
        span = c.computed[begin + r];
        fill_outside(row, span, c.seen[begin + r], lowest);
      } else if (keys < c.keys.end) {
        store(row + tail, inside ? load(row + tail) : splat(lowest));
      }
      Vec<A> even = splat(lowest), odd = even;
      int64_t j = span.begin;
      for (; j + 2 * W <= span.end; j += 2 * W) {
        even = max_of(even, load(row + j));
        odd = max_of(odd, load(row + j + W));
      }
      if (j < span.end) even = max_of(even, load(row + j));
      top[r] = max_of(even, odd);
    }
    for (int64_t r = rows; r < W; ++r) top[r] = splat(A(0));
    const Vec<A> largest = reduce_lanes<A>(top, [](Vec<A> a, Vec<A> b) { return max_of(a, b); });
    A shifts[W];
    store(shifts, largest == splat(lowest) ? splat(A(0)) : largest);
    Vec<A> sums[W];
    for (int64_t r = 0; r < rows; ++r) {
      A* row = s + (begin + r) * stride;
      const Span span = c.limited ? c.computed[begin + r] : c.keys;
      const Vec<A> shift = splat(shifts[r]);
      Vec<A> sum = {};
      int64_t j = span.begin;
      for (; j + 4 * W <= span.end; j += 4 * W) exponentiate<4>(row + j, shift, sum);
      exponentiate_last(row + j, (span.end - j) / W, shift, sum);
      sums[r] = sum;
    }
    for (int64_t r = rows; r < W; ++r) sums[r] = splat(A(1));
    const Vec<A> sum = reduce_lanes<A>(sums, [](Vec<A> a, Vec<A> b) { return a + b; });
    store(factors + begin, sum == splat(A(0)) ? splat(A(0)) : splat(A(1)) / sum);
    store(lse + begin, largest * splat(A(0.6931471805599453)) + log_of(sum));
  }
}

// Sizes of what a task keeps in scratch.
struct Sizes {
  int64_t keys, keys_padded, dim_padded, score_stride, panels, chunk;  // of a chunk, and its rows

  template <class A>
  static Sizes of(const Attention& p, const AttentionTask& t, int64_t most_panels) {
    constexpr int64_t W = kLanes<A>, kLine = 64 / sizeof(A);
    Sizes s;
    s.keys = t.key_end - t.key_begin;
    s.keys_padded = round_up(s.keys, W);
    s.dim_padded = round_up(p.dim, W);
    // An odd number of cache lines, so that rows do not fall onto the same ones.
    s.score_stride = (ceil_div(s.keys_padded, kLine) | 1) * kLine;
    const int64_t fitting = kChunkBytes / int64_t(sizeof(A)) / s.score_stride;
    s.panels = max_of<int64_t>(min_of(fitting / kWideRows, most_panels), 1);
    s.chunk = s.panels * kWideRows;
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

// Asks, a few rows with every register tile, for what will be read or written next: the rest of the
// task's query rows, then the next task's rows. Heads lie too far apart in memory for a hardware
// prefetcher to foresee them.
class Prefetcher {
 public:
  template <class S>
  static Prefetcher of(const Attention& p, const AttentionTask& t, const AttentionTask* next,
                       int64_t panels, int64_t chunk, S) {
    Prefetcher f;
    f.row_bytes_ = p.dim * int64_t(sizeof(S));
    f.add_rows<S>(p, t, t.row_begin + chunk);
    if (next) {
      const int64_t keys = next->key_end - next->key_begin;
      const int64_t first = next->sequence.key + next->key_begin;
      if (keys <= kMostPrefetchedKeys) {
        f.add<S>(p.key, first, next->key_head, keys);
        f.add<S>(p.value, first, next->key_head, keys);
        f.add_rows<S>(p, *next, next->row_begin);
      }
    }
    constexpr int64_t kColumns = 2 * kLanes<typename Accumulator<S>::type>;
    const int64_t tiles =
        panels * (ceil_div(t.key_end - t.key_begin, kColumns) + ceil_div(p.dim, kColumns));
    f.rate_ = ceil_div(f.rows_, max_of<int64_t>(tiles, 1));
    return f;
  }

  LK_INLINE void ask() {
    for (int64_t rows = rate_; rows > 0 && next_ < count_;) {
      Block& b = blocks_[next_];
      for (; rows > 0 && b.rows > 0; --rows, --b.rows, b.at += b.stride)
        for (int64_t i = 0; i < row_bytes_; i += 64) __builtin_prefetch(b.at + i, 0, 2);
      if (b.rows == 0) ++next_;
    }
  }

 private:
  struct Block {
    const char* at;
    int64_t rows, stride;  // in bytes
  };
  Block blocks_[6];
  int count_ = 0, next_ = 0;
  int64_t row_bytes_ = 0, rows_ = 0, rate_ = 0;

  template <class S>
  void add(const Heads& h, int64_t row, int64_t head, int64_t rows) {
    constexpr int64_t size = sizeof(S);
    if (rows <= 0) return;
    blocks_[count_++] = {static_cast<const char*>(h.data) + size * (row * h.row + head * h.head),
                         rows, size * h.row};
    rows_ += rows;
  }

  // Query rows of a task from `row` on, of its first head.
  template <class S>
  void add_rows(const Attention& p, const AttentionTask& t, int64_t row) {
    const int64_t head = t.key_head * p.group, first = t.sequence.query + row;
    add<S>(p.query, first, head, t.row_end - row);
    add<S>({p.out, p.heads * p.dim, p.dim}, first, head, t.row_end - row);
  }
};

// products [rows, columns] = multiplier * rows · keys, for the columns each panel computes.
template <class A>
void multiply_keys(const Chunk& c, const A* rows, int64_t ld, const A* keys, int64_t key_count,
                   int64_t dim, A multiplier, A* products, int64_t stride,
                   Prefetcher* prefetcher = nullptr) {
  constexpr int W = kLanes<A>;
  for (int64_t j = c.keys.begin; j < c.keys.end; j += 2 * W) {
    const bool wide = key_count - j > W;
    for (int64_t i = 0; i < c.panels; ++i) {
      const RowPanel& panel = c.panel[i];
      if (j < panel.keys.begin || j >= panel.keys.end) continue;
      int64_t height = panel.rows;
      // A single vector of keys takes two panels at once, for enough sums in flight.
      if (!wide && i + 1 < c.panels && j >= c.panel[i + 1].keys.begin &&
          j < c.panel[i + 1].keys.end)
        height += c.panel[++i].rows;
      const ScoreTile<A> tile = wide ? score_tile<A, 2>(height) : score_tile<A, 1>(height);
      tile(rows + panel.begin * ld, ld, keys + j * dim, dim, multiplier,
           products + panel.begin * stride + j, stride);
      if (prefetcher) prefetcher->ask();
    }
  }
}

// weights [rows, keys] · values [keys, dim], into sums [rows, ld]; or, times the rows' factors,
// straight to outputs[panel] with rows out_row apart where that is not null.
template <class A>
void multiply_values(const Chunk& c, const A* weights, int64_t stride, const Strips<A>& values,
                     int64_t key_count, int64_t dim, A* sums, int64_t ld,
                     A* const* outputs = nullptr, int64_t out_row = 0,
                     const A* factors = nullptr, Prefetcher* prefetcher = nullptr) {
  constexpr int W = kLanes<A>;
  const int64_t all = min_of(c.keys.end, key_count);
  for (int64_t i = 0; i < c.panels; ++i)
    if (c.panel[i].keys.begin >= c.panel[i].keys.end)
      for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r)
        for (int64_t d = 0; d < ld; ++d) sums[r * ld + d] = 0;
  for (int64_t k = c.keys.begin; k < all; k += kKeyBlock)
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const bool wide = dim - d > W;
      const int64_t row = values.ld ? values.ld : wide ? 2 * W : W;
      const A* strip = values.data + d * values.step;
      for (int64_t i = 0; i < c.panels; ++i) {
        const RowPanel& panel = c.panel[i];
        const int64_t begin = max_of(k, panel.keys.begin);
        const int64_t end = min_of(min_of(k + kKeyBlock, all), panel.keys.end);
        if (begin >= end) continue;
        const SumTile<A> tile =
            wide ? sum_tile<A, 2, false>(panel.rows) : sum_tile<A, 1, false>(panel.rows);
        const A* from = weights + panel.begin * stride + begin;
        if (outputs && outputs[i]) {
          tile(from, stride, strip + begin * row, row, end - begin, outputs[i] + d, out_row, false,
               factors + panel.begin);
        } else {
          tile(from, stride, strip + begin * row, row, end - begin, sums + panel.begin * ld + d,
               ld, begin > panel.keys.begin, nullptr);
        }
        if (prefetcher) prefetcher->ask();
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
  const Sizes z = Sizes::of<A>(p, t, kForwardPanels);
  return sizeof(A) * (z.keys_padded * p.dim + z.keys * z.dim_padded + z.chunk * p.dim +
                      z.chunk * z.score_stride + z.chunk * z.dim_padded +
                      p.group * z.keys_padded + 8 * 64);
}

// Adds each row's probabilities, weights[r] * factor[r], to its head's column sums.
template <class A>
void add_column_sums(const Chunk& c, const A* weights, int64_t stride, const A* factors, A* sums,
                     int64_t sums_stride) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < c.panels; ++i) {
    const RowPanel& panel = c.panel[i];
    for (int64_t r = panel.begin, last = r + panel.rows; r < last;) {
      int64_t end = r + 1;
      while (end < last && c.head[end] == c.head[r]) ++end;
      A* to = sums + c.head[r] * sums_stride;
      for (int64_t j = panel.keys.begin; j < panel.keys.end; j += W) {
        Vec<A> sum = {};
        for (int64_t k = r; k < end; ++k) sum += load(weights + k * stride + j) * factors[k];
        store(to + j, load(to + j) + sum);
      }
      r = end;
    }
  }
}

constexpr int64_t kFewRows = 24;  // that many query rows do not pay for packing the values

template <class S>
void forward(const Attention& p, const AttentionTask& t, const AttentionTask* next,
             void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const Sizes z = Sizes::of<A>(p, t, kForwardPanels);
  const Sequence& s = t.sequence;
  const int64_t all_rows = (t.row_end - t.row_begin) * p.group, first_head = t.key_head * p.group;
  const bool whole = whole_vectors<S, A>(p.dim);
  Arena<A> arena{static_cast<A*>(scratch)};
  A* keys = arena.take(z.keys_padded * p.dim);
  A* packed_values = arena.take(z.keys * z.dim_padded);
  A* packed_rows = arena.take(z.chunk * p.dim);
  A* weights = arena.take(z.chunk * z.score_stride);
  A* sums = arena.take(z.chunk * z.dim_padded);
  A* column_sums = arena.take(p.group * z.keys_padded);

  const int64_t first_key = s.key + t.key_begin;
  pack_keys(static_cast<const S*>(p.key.data) + first_key * p.key.row + t.key_head * p.key.head,
            p.key.row, z.keys, p.dim, keys);
  const S* value =
      static_cast<const S*>(p.value.data) + first_key * p.value.row + t.key_head * p.value.head;
  const Strips<A> values =
      whole && all_rows <= kFewRows
          ? Strips<A>{reinterpret_cast<const A*>(value), 1, p.value.row}
          : pack_strips(value, p.value.row, z.keys, p.dim, packed_values);
  if (p.scores)
    for (int64_t i = 0; i < p.group * z.keys_padded; ++i) column_sums[i] = 0;

  Chunk c;
  Chunks all{Panels(all_rows, kWideRows), z.panels};
  Prefetcher prefetcher = Prefetcher::of(p, t, next, all.panels.count, z.chunk, S());
  while (!all.done()) {
    cut<A>(p, t, all, c);
    const auto query_at = [&](int64_t r) {
      return static_cast<const S*>(p.query.data) + (s.query + c.row[r]) * p.query.row +
             (first_head + c.head[r]) * p.query.head;
    };
    const auto out_at = [&](int64_t r) {
      return static_cast<S*>(p.out) +
             ((s.query + c.row[r]) * p.heads + first_head + c.head[r]) * p.dim;
    };
    const A* rows = packed_rows;
    int64_t row_stride = p.dim;
    if (sizeof(S) == sizeof(A) && c.head[0] == c.head[c.rows - 1]) {
      rows = reinterpret_cast<const A*>(query_at(0));
      row_stride = p.query.row;
    } else {
      for (int64_t r = 0; r < c.rows; ++r) pack_row(query_at(r), p.dim, packed_rows + r * p.dim, p.dim);
    }
    multiply_keys(c, rows, row_stride, keys, z.keys, p.dim, A(p.scale * 1.4426950408889634),
                  weights, z.score_stride, &prefetcher);

    A factors[kChunkRows + W], lse[kChunkRows + W];
    softmax(c, weights, z.score_stride, z.keys, factors, lse);
    for (int64_t r = 0; r < c.rows; ++r)
      static_cast<A*>(p.lse)[(s.query + c.row[r]) * p.heads + first_head + c.head[r]] = lse[r];

    const bool direct = whole && c.keys.end - c.keys.begin <= kKeyBlock;
    A* outputs[kChunkPanels] = {};
    if (direct)
      for (int64_t i = 0; i < c.panels; ++i)
        if (c.panel[i].one_head && c.panel[i].keys.end)
          outputs[i] = reinterpret_cast<A*>(out_at(c.panel[i].begin));
    multiply_values(c, weights, z.score_stride, values, z.keys, p.dim, sums, z.dim_padded, outputs,
                    p.heads * p.dim, factors, &prefetcher);
    for (int64_t i = 0; i < c.panels; ++i)
      if (!outputs[i])
        for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r)
          store_row(sums + r * z.dim_padded, p.dim, factors[r], out_at(r));

    if (!p.scores) continue;
    if (p.exclude_diagonal)
      for (int64_t r = 0; r < c.rows; ++r) {
        const Span own = keys_within(p, s, c.row[r], 0, 0);
        for (int64_t j = max_of(own.begin, t.key_begin); j < min_of(own.end, t.key_end); ++j)
          weights[r * z.score_stride + j - t.key_begin] = 0;
      }
    add_column_sums(c, weights, z.score_stride, factors, column_sums, z.keys_padded);
  }
  if (p.scores)
    for (int64_t h = 0; h < p.group; ++h) {
      A* to = static_cast<A*>(p.scores) + (first_head + h) * p.scores_head + t.scores_at;
      const A* from = column_sums + h * z.keys_padded;
      for (int64_t j = 0; j < t.key_begin; ++j) to[j] = 0;
      for (int64_t j = 0; j < z.keys; ++j) to[t.key_begin + j] = from[j];
      for (int64_t j = t.key_end; j < s.keys; ++j) to[j] = 0;
    }
}

// ---- gradients ----------------------------------------------------------------------------------

template <class S>
size_t grad_scratch(const Attention& p, const AttentionTask& t) {
  using A = typename Accumulator<S>::type;
  const Sizes z = Sizes::of<A>(p, t, kGradPanels);
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
           true, nullptr);
      j += height;
    }
  }
}

template <class S>
void grad(const Attention& p, const AttentionTask& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  constexpr int W = kLanes<A>;
  const Sizes z = Sizes::of<A>(p, t, kGradPanels);
  const Sequence& s = t.sequence;
  const int64_t all_rows = (t.row_end - t.row_begin) * p.group, first_head = t.key_head * p.group;
  const int64_t padded = z.dim_padded, stride = z.score_stride;
  Arena<A> arena{static_cast<A*>(scratch)};
  A* keys = arena.take(z.keys_padded * p.dim);     // panels of keys
  A* values = arena.take(z.keys_padded * p.dim);   // and of values
  A* packed = arena.take(z.keys * padded);         // keys again, in strips
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
  const Strips<A> strips = pack_strips(key, p.key.row, z.keys, p.dim, packed);
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
                                    (first_head + h) * p.grad_scores.head] *
                           share)
                       : A(0);
  }

  Chunk c;
  for (Chunks all{Panels(max_of<int64_t>(all_rows, 1), kWideRows), z.panels};
       all_rows && !all.done();) {
    cut<A>(p, t, all, c);
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t token = s.query + c.row[r], head = first_head + c.head[r];
      pack_row(static_cast<const S*>(p.query.data) + token * p.query.row + head * p.query.head,
               p.dim, queries + r * padded, padded);
      pack_row(static_cast<const S*>(p.grad_out.data) + token * p.grad_out.row +
                   head * p.grad_out.head,
               p.dim, upstream + r * padded, padded);
    }
    multiply_keys(c, queries, padded, keys, z.keys, p.dim, A(p.scale * 1.4426950408889634), weights,
                  stride);
    multiply_keys(c, upstream, padded, values, z.keys, p.dim, A(1), slopes, stride);
    A factors[kChunkRows + W], lse[kChunkRows + W];
    softmax(c, weights, stride, z.keys, factors, lse);
    for (int64_t i = 0; i < c.panels; ++i) {
      const Span span = c.panel[i].keys;
      for (int64_t r = c.panel[i].begin, end = r + c.panel[i].rows; r < end; ++r) {
        A* w = weights + r * stride;
        A* g = slopes + r * stride;
        // Where the panel computed nothing, both count as zero for the keys' gradients.
        for (int64_t j = c.keys.begin; j < c.keys.end; j += W)
          if (j < span.begin || j >= span.end) {
            store(w + j, splat(A(0)));
            store(g + j, splat(A(0)));
          }
        if (p.grad_scores.data) {
          Span own{0, 0};
          if (p.exclude_diagonal) {
            own = keys_within(p, s, c.row[r], 0, 0);
            own = {own.begin - t.key_begin, own.end - t.key_begin};
          }
          const A* add = of_scores + c.head[r] * z.keys_padded;
          for (int64_t j = span.begin; j < span.end; j += W) {
            const Vec<A> more = lanes_inside<A>(j, own) ? splat(A(0)) : load(add + j);
            store(g + j, load(g + j) + more);
          }
        }
        const Vec<A> factor = splat(factors[r]);
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
    }
    multiply_values(c, slopes, stride, strips, z.keys, p.dim, sums, padded);
    for (int64_t r = 0; r < c.rows; ++r)
      store_row(sums + r * padded, p.dim, A(1),
                static_cast<S*>(p.grad_query) +
                    ((s.query + c.row[r]) * p.heads + first_head + c.head[r]) * p.dim);
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

const AttentionKernels LEAN_KERNELS_ISA::attention[kDtypes] = {
    attention_kernels<float>(), attention_kernels<BFloat16>(), attention_kernels<Float16>(),
    attention_kernels<double>()};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// A chunk of ragged_attention's query rows: which keys they see, and what is done with all of them.
#pragma once

#include "../ragged_attention.h"
#include "attention_tiles.h"

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
template <class A, class Keep>
LK_INLINE void exponentiate_last(const A* s, int64_t j, int64_t count, Vec<A> multiplier,
                                 Vec<A> shift, Vec<A>& sum, Keep keep) {
  switch (count) {
    case 1: return exponentiate<1>(s, j, multiplier, shift, sum, keep);
    case 2: return exponentiate<2>(s, j, multiplier, shift, sum, keep);
    case 3: return exponentiate<3>(s, j, multiplier, shift, sum, keep);
  }
}

// Hands keep(row, column, vector) 2^(t - largest of the row), t = multiplier s > 0, of rows s
// [rows, columns] of a chunk over the columns computed for each, 0 for keys the row does not see:
// those past `keys`, and where the chunk is limited those outside of its span. Gives the factor
// that normalises each row (0 where nothing is seen) and the natural logarithm of the sum of 2^t.
// `factors` and `lse` have room for whole vectors.
template <class A, class Keep>
void softmax(const Chunk& c, A multiplier, A* s, int64_t stride, int64_t keys, A* factors, A* lse,
             Keep keep) {
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
    const Vec<A> largest = reduce_lanes<A>(top, [](Vec<A> a, Vec<A> b) { return max_of(a, b); }) *
                           splat(multiplier);
    A shifts[W];
    store(shifts, largest == splat(lowest) ? splat(A(0)) : largest);
    Vec<A> sums[W];
    for (int64_t r = 0; r < rows; ++r) {
      A* row = s + (begin + r) * stride;
      const Span span = c.limited ? c.computed[begin + r] : c.keys;
      const Vec<A> shift = splat(shifts[r]);
      Vec<A> sum = {};
      int64_t j = span.begin;
      const auto keep_here = [&](int64_t at, Vec<A> v) { keep(begin + r, at, v); };
      for (; j + 4 * W <= span.end; j += 4 * W)
        exponentiate<4>(row, j, splat(multiplier), shift, sum, keep_here);
      exponentiate_last(row, j, (span.end - j) / W, splat(multiplier), shift, sum, keep_here);
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
  static Sizes of(const Attention& p, const AttentionTask& t, int64_t most_panels,
                  int64_t panel_rows = kWideRows) {
    constexpr int64_t W = kLanes<A>, kLine = 64 / sizeof(A);
    Sizes s;
    s.keys = t.key_end - t.key_begin;
    s.keys_padded = round_up(s.keys, W);
    s.dim_padded = round_up(p.dim, W);
    // Odd numbers of pairs of cache lines, so that rows do not fall onto the same ones; their
    // halves once rounded are whole lines.
    s.score_stride = (ceil_div(s.keys_padded, 2 * kLine) | 1) * 2 * kLine;
    const int64_t fitting = kChunkBytes / int64_t(sizeof(A)) / s.score_stride;
    s.panels = max_of<int64_t>(min_of(fitting / panel_rows, most_panels), 1);
    s.chunk = s.panels * panel_rows;
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

// products [rows, columns] = multiplier * rows · keys, for the columns each panel computes. Rows
// and keys have `depth` packed elements.
template <class M, class A = typename M::A, class P = typename M::P>
void multiply_keys(const Chunk& c, const P* rows, int64_t ld, const P* keys, int64_t key_count,
                   int64_t depth, A multiplier, A* products, int64_t stride,
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
      const ScoreTile<M> tile = wide ? score_tile<M, 2>(height) : score_tile<M, 1>(height);
      tile(rows + panel.begin * ld, ld, keys + j * depth, depth, multiplier,
           products + panel.begin * stride + j, stride);
      if (prefetcher) prefetcher->ask();
    }
  }
}

// weights [rows, keys] · values [keys, dim], into sums [rows, ld]; or, times the rows' factors,
// straight to outputs[panel] with rows out_row apart where that is not null. The stride of weights
// counts packed elements.
template <class M, class A = typename M::A, class P = typename M::P>
void multiply_values(const Chunk& c, const P* weights, int64_t stride, const Strips<P>& values,
                     int64_t key_count, int64_t dim, A* sums, int64_t ld,
                     A* const* outputs = nullptr, int64_t out_row = 0,
                     const A* factors = nullptr, Prefetcher* prefetcher = nullptr) {
  constexpr int W = kLanes<A>, K = M::kInputs;
  const int64_t all = min_of(c.keys.end, key_count);
  for (int64_t i = 0; i < c.panels; ++i)
    if (c.panel[i].keys.begin >= c.panel[i].keys.end)
      for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r)
        for (int64_t d = 0; d < ld; ++d) sums[r * ld + d] = 0;
  for (int64_t k = c.keys.begin; k < all; k += kKeyBlock)
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const bool wide = dim - d > W;
      const int64_t row = values.ld ? values.ld : wide ? 2 * W : W;
      const P* strip = values.data + d * values.step;
      for (int64_t i = 0; i < c.panels; ++i) {
        const RowPanel& panel = c.panel[i];
        const int64_t begin = max_of(k, panel.keys.begin);
        const int64_t end = min_of(min_of(k + kKeyBlock, all), panel.keys.end);
        if (begin >= end) continue;
        const SumTile<M> tile =
            wide ? sum_tile<M, 2, false>(panel.rows) : sum_tile<M, 1, false>(panel.rows);
        const P* from = weights + panel.begin * stride + begin / K;
        const P* rows = strip + begin / K * row;
        const int64_t depth = ceil_div(end - begin, K);
        if (outputs && outputs[i]) {
          tile(from, stride, rows, row, depth, outputs[i] + d, out_row, false,
               factors + panel.begin);
        } else {
          tile(from, stride, rows, row, depth, sums + panel.begin * ld + d, ld,
               begin > panel.keys.begin, nullptr);
        }
        if (prefetcher) prefetcher->ask();
      }
    }
}

template <class M, class S, class A = typename M::A>
LK_INLINE void store_row(const A* sums, int64_t dim, A multiplier, S* to) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + W <= dim; d += W) M::store_rounded(to + d, load(sums + d) * multiplier);
  for (; d < dim; ++d) narrow(sums[d] * multiplier, to + d);
}

}  // namespace
}  // namespace lean_kernels

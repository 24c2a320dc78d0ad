// SPDX-License-Identifier: Apache-2.0
// The inner loops of ragged_attention, for one instruction set.
//
// A task packs its keys into panels of one or two vectors of keys, element after element of the
// head, and its values into strips of columns. Then it takes its query rows in chunks: products
// with every key a row may see, softmax over the whole row, product with the values. A chunk's
// scores stay in cache for sequences of up to a few thousand keys, and nothing is ever computed
// twice, however long the sequence is. All sums run in an order that depends on the sequence alone.
#include "../isa.h"

#include "attention_amx.h"

namespace lean_kernels {
namespace {

// ---- forward ------------------------------------------------------------------------------------

template <class M>
struct ForwardSizes : Sizes {
  int64_t rows;  // that a chunk's arrays have room for

  ForwardSizes(const Attention& p, const AttentionTask& t)
      : Sizes(of<typename M::A>(p, t, kForwardPanels, M::kPanelRows)),
        rows(chunk + (M::kTiles ? M::kPanelRows : 0)) {}
};

template <class M>
size_t forward_scratch(const Attention& p, const AttentionTask& t) {
  const ForwardSizes<M> z(p, t);
  return sizeof(typename M::A) *
         (z.keys_padded * p.dim + (z.keys_padded + 1) * z.dim_padded + z.rows * p.dim +
          z.rows * z.score_stride * 3 / 2 + z.rows * z.dim_padded + p.group * z.keys_padded +
          8 * 64);
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

template <class S, class M>
void forward_by(const Attention& p, const AttentionTask& t, const AttentionTask* next,
                void* scratch) {
  using A = typename M::A;
  using P = typename M::P;
  constexpr int W = kLanes<A>, K = M::kInputs;
  static_assert(sizeof(P) == sizeof(A));
  const ForwardSizes<M> z(p, t);
  const Sequence& s = t.sequence;
  const int64_t all_rows = (t.row_end - t.row_begin) * p.group, first_head = t.key_head * p.group;
  const int64_t depth = ceil_div(p.dim, K);
  const bool whole = whole_vectors<S, A>(p.dim);
  Arena<A> arena{static_cast<A*>(scratch)};
  P* keys = reinterpret_cast<P*>(arena.take(z.keys_padded * p.dim));
  P* packed_values = reinterpret_cast<P*>(arena.take((z.keys_padded + 1) * z.dim_padded));
  P* packed_rows = reinterpret_cast<P*>(arena.take(z.rows * p.dim));
  S* rounded = reinterpret_cast<S*>(arena.take(z.rows * z.score_stride / 2));  // weights, if K > 1
  A* weights = arena.take(z.rows * z.score_stride);
  A* sums = arena.take(z.rows * z.dim_padded);
  A* column_sums = arena.take(p.group * z.keys_padded);

  const int64_t first_key = s.key + t.key_begin;
  pack_keys<M>(static_cast<const S*>(p.key.data) + first_key * p.key.row + t.key_head * p.key.head,
            p.key.row, z.keys, p.dim, keys);
  const S* value =
      static_cast<const S*>(p.value.data) + first_key * p.value.row + t.key_head * p.value.head;
  const Strips<P> values =
      whole && all_rows <= kFewRows
          ? Strips<P>{reinterpret_cast<const P*>(value), 1, p.value.row}
          : pack_strips<M>(value, p.value.row, z.keys, p.dim, packed_values);
  if (p.scores)
    for (int64_t i = 0; i < p.group * z.keys_padded; ++i) column_sums[i] = 0;

  Chunk c;
  Chunks all{Panels(all_rows, M::kPanelRows), z.panels};
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
    const P* rows = packed_rows;
    int64_t row_stride = depth;
    if (sizeof(S) == sizeof(P) && c.head[0] == c.head[c.rows - 1]) {
      rows = reinterpret_cast<const P*>(query_at(0));
      row_stride = p.query.row;
    } else {
      for (int64_t r = 0; r < c.rows; ++r)
        pack_row<M>(query_at(r), p.dim, packed_rows + r * depth, depth);
    }
    const A multiplier = A(p.scale * 1.4426950408889634);
    if constexpr (M::kTiles) {
      tiles_of_keys(c, rows, row_stride, keys, z.keys, depth, weights, z.score_stride, prefetcher);
    } else {
      multiply_keys<M>(c, rows, row_stride, keys, z.keys, depth, multiplier, weights,
                       z.score_stride, &prefetcher);
    }

    A factors[kChunkRows + W], lse[kChunkRows + W];
    softmax(c, M::kTiles ? multiplier : A(1), weights, z.score_stride, z.keys, factors, lse,
            [&](int64_t r, int64_t j, Vec<A> v) {
              const int64_t at = r * z.score_stride + j;
              if (K == 1 || p.scores) store(weights + at, v);
              if constexpr (K > 1) M::store_rounded(rounded + at, v);
            });
    for (int64_t r = 0; r < c.rows; ++r)
      static_cast<A*>(p.lse)[(s.query + c.row[r]) * p.heads + first_head + c.head[r]] = lse[r];

    const bool direct = whole && c.keys.end - c.keys.begin <= kKeyBlock;
    A* outputs[kChunkPanels] = {};
    if (direct)
      for (int64_t i = 0; i < c.panels; ++i)
        if (c.panel[i].one_head && c.panel[i].keys.end)
          outputs[i] = reinterpret_cast<A*>(out_at(c.panel[i].begin));
    const P* probabilities = reinterpret_cast<const P*>(weights);
    if constexpr (K > 1) probabilities = reinterpret_cast<const P*>(rounded);
    if constexpr (M::kTiles) {
      for (int64_t i = 0; i < c.panels; ++i)
        if (const int64_t end = c.panel[i].keys.end; end % (2 * W))
          for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r)
            M::store_rounded(rounded + r * z.score_stride + end, Vec<A>{});
      tiles_of_values(c, probabilities, z.score_stride / K, values, p.dim, sums, z.dim_padded,
                      prefetcher);
    } else {
      multiply_values<M>(c, probabilities, z.score_stride / K, values, z.keys, p.dim, sums,
                         z.dim_padded, outputs, p.heads * p.dim, factors, &prefetcher);
    }
    for (int64_t i = 0; i < c.panels; ++i)
      if (!outputs[i])
        for (int64_t r = c.panel[i].begin; r < c.panel[i].begin + c.panel[i].rows; ++r)
          store_row<M>(sums + r * z.dim_padded, p.dim, factors[r], out_at(r));

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

template <class S>
void forward(const Attention& p, const AttentionTask& t, const AttentionTask* next,
             void* scratch) {
#if defined(__AVX512F__)
  if constexpr (__is_same(S, BFloat16))
    if (BFloat16Pairs::fast()) return forward_by<S, BFloat16Pairs>(p, t, next, scratch);
#endif
  forward_by<S, MultiplyAdd<typename Accumulator<S>::type>>(p, t, next, scratch);
}

#if defined(__AVX512F__)
size_t tiles_scratch(const Attention& p, const AttentionTask& t) {
  return BFloat16Tiles::fit(p) ? forward_scratch<BFloat16Tiles>(p, t)
                               : forward_scratch<MultiplyAdd<float>>(p, t);
}
void forward_by_tiles(const Attention& p, const AttentionTask& t, const AttentionTask* next,
                      void* scratch) {
  if (!BFloat16Tiles::fit(p)) return forward<BFloat16>(p, t, next, scratch);
  const TileRegisters registers(kTileBytes);
  forward_by<BFloat16, BFloat16Tiles>(p, t, next, scratch);
}
#endif

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
  using M = MultiplyAdd<A>;
  constexpr int W = kLanes<A>;
  const int64_t begin = c.keys.begin, count = min_of(c.keys.end, key_count) - begin;
  if (count <= 0) return;
  const Panels panels(count, kWideRows);
  for (int64_t d = 0; d < dim; d += 2 * W) {
    const bool wide = dim - d > W;
    for (int64_t i = 0, j = begin; i < panels.count; ++i) {
      const int64_t height = panels.height + (i < panels.taller);
      const SumTile<M> tile = wide ? sum_tile<M, 2, true>(height) : sum_tile<M, 1, true>(height);
      tile(weights + j, stride, rows + d, dim_padded, c.rows, to + j * dim_padded + d, dim_padded,
           true, nullptr);
      j += height;
    }
  }
}

template <class S>
void grad(const Attention& p, const AttentionTask& t, void* scratch) {
  using A = typename Accumulator<S>::type;
  using M = MultiplyAdd<A>;
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
  pack_keys<M>(key, p.key.row, z.keys, p.dim, keys);
  const Strips<A> strips = pack_strips<M>(key, p.key.row, z.keys, p.dim, packed);
  pack_keys<M>(static_cast<const S*>(p.value.data) + first_key * p.value.row +
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
      pack_row<M>(static_cast<const S*>(p.query.data) + token * p.query.row + head * p.query.head,
               p.dim, queries + r * padded, padded);
      pack_row<M>(static_cast<const S*>(p.grad_out.data) + token * p.grad_out.row +
                   head * p.grad_out.head,
               p.dim, upstream + r * padded, padded);
    }
    multiply_keys<M>(c, queries, padded, keys, z.keys, p.dim, A(p.scale * 1.4426950408889634),
                     weights, stride);
    multiply_keys<M>(c, upstream, padded, values, z.keys, p.dim, A(1), slopes, stride);
    A factors[kChunkRows + W], lse[kChunkRows + W];
    softmax(c, A(1), weights, stride, z.keys, factors, lse,
            [&](int64_t r, int64_t j, Vec<A> v) { store(weights + r * stride + j, v); });
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
    multiply_values<M>(c, slopes, stride, strips, z.keys, p.dim, sums, padded);
    for (int64_t r = 0; r < c.rows; ++r)
      store_row<M>(sums + r * padded, p.dim, A(1),
                static_cast<S*>(p.grad_query) +
                    ((s.query + c.row[r]) * p.heads + first_head + c.head[r]) * p.dim);
    add_transposed(c, slopes, stride, queries, p.dim, padded, z.keys, grad_keys);
    add_transposed(c, weights, stride, upstream, p.dim, padded, z.keys, grad_values);
  }
  const int64_t key_heads = p.heads / p.group;
  for (int64_t j = 0; j < z.keys; ++j) {
    const int64_t to = ((first_key + j) * key_heads + t.key_head) * p.dim;
    store_row<M>(grad_keys + j * padded, p.dim, A(1), static_cast<S*>(p.grad_key) + to);
    store_row<M>(grad_values + j * padded, p.dim, A(1), static_cast<S*>(p.grad_value) + to);
  }
}

template <class S>
constexpr AttentionKernels attention_kernels() {
  return {forward_scratch<MultiplyAdd<typename Accumulator<S>::type>>, forward<S>, grad_scratch<S>,
          grad<S>};
}

}  // namespace

const AttentionKernels LEAN_KERNELS_ISA::attention[kDtypes] = {
    attention_kernels<float>(), attention_kernels<BFloat16>(), attention_kernels<Float16>(),
    attention_kernels<double>()};

#if defined(__AVX512F__)
const AttentionKernels LEAN_KERNELS_ISA::amx_attention_bfloat16 = {tiles_scratch, forward_by_tiles,
                                                          grad_scratch<BFloat16>, grad<BFloat16>};
#endif

}  // namespace lean_kernels

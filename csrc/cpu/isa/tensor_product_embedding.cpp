// SPDX-License-Identifier: Apache-2.0
// tensor_product_embedding of one instruction set. A row is a product [q, r] x [r, q^(n-1)] with
// the ranks as its inner dimension, all of it in L1.
#include "../isa.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "embedding_row.h"
#include "tensor_product_parts.h"

namespace lean_kernels {
namespace {

constexpr uint32_t kRowsAhead = 3;  // of the gradient, fetched into L2

template <class S>
bool make_rows(const TensorProduct& p, const EmbeddingRows& end, const Piece* pieces, int64_t count,
               const uint32_t* positions, void* memory) {
  using A = typename Accumulator<S>::type;
  Arena<A> arena{static_cast<A*>(memory)};
  RowScratch<A> scratch(p, arena);
  const bool added = end.added[0].ids;
  A* made = scratch.made;
  A* summed = added ? arena.take(p.features) : made;
  // Where an id occurs again, its normalised row is only copied.
  EmbeddingRows in_place = end, copy = end;
  in_place.out = made;
  in_place.stream = false;
  copy.norm = kNoNorm;
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    int64_t index[kMostOrder] = {};
    if (!p.morphemes_of(piece.id, index)) return false;
    prefetch_pieces<S>(p, pieces + i, count - i);
    read_all<S>(p, index, scratch);
    make_row(p, scratch);
    const bool repeated = piece.end - piece.begin > 1 && end.norm != kNoNorm && !added;
    if (repeated) finish_row<A>(in_place, 0, made, made, 0);
    const auto place = [&](uint32_t at) { return positions ? positions[at] : at; };
    for (uint32_t at = piece.begin; at < piece.end; ++at)
      finish_row<S>(repeated ? copy : end, place(at), made, summed,
                    place(std::min(at + 1, piece.end - 1)));
  }
  if (end.stream) end_of_stores();
  return true;
}

// sums += g * normal and g, dx = the gradient of x, for g that of the row normalised. In place if
// dx is g.
template <class A>
void norm_grad(const EmbeddingRows& p, const A* x, const A* g, A* sums, A* dx) {
  const int64_t n = p.features;
  const A* weight = static_cast<const A*>(p.weight);
  const bool layer = p.norm == kLayerNorm;
  const A center =
      layer ? sum_over<A>(n, [&](int64_t i, auto kind) { return read(kind, x + i); }) / A(n) : A(0);
  const A scale = A(1) / std::sqrt(squared_distance(x, center, n) / A(n) + A(p.eps));
  const auto normal = [&](int64_t i, auto kind) { return (read(kind, x + i) - center) * scale; };
  const auto scaled = [&](int64_t i, auto kind) {
    return weight ? read(kind, g + i) * read(kind, weight + i) : read(kind, g + i);
  };
  Vec<A> part = {};  // of the sum of `scaled`, of which `rest` is no whole vector
  A rest = 0;
  const A along = sum_over<A>(n, [&](int64_t i, auto kind) {
    const auto v = normal(i, kind), upstream = read(kind, g + i), s = scaled(i, kind);
    keep(sums + i, read(kind, sums + i) + upstream * v);
    keep(sums + n + i, read(kind, sums + n + i) + upstream);
    if constexpr (std::is_arithmetic_v<decltype(kind)>) {
      rest += s;
    } else {
      part += s;
    }
    return s * v;
  }) / A(n);
  const A mean = layer ? (sum_of_lanes<A>(part) + rest) / A(n) : A(0);
  sum_over<A>(n, [&](int64_t i, auto kind) {
    return keep(dx + i, (scaled(i, kind) - mean - normal(i, kind) * along) * scale);
  });
}

struct Plus {
  template <class V>
  LK_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

// to[i * size + a] = sum over w of t_i[a][w] * tail_i[w] for ranks i, a < digits, w < width. Ranks
// lie t_stride apart in t, 0 where all have the same.
template <class A>
void dots(const A* t, int64_t t_stride, const A* tail, int64_t tail_stride, int64_t rank,
          int64_t size, int64_t digits, int64_t width, A* to) {
  constexpr int W = kLanes<A>, kDigits = W / 2;
  for (int64_t i = 0; i < rank; i += 2) {
    const int64_t other = std::min(i + 1, rank - 1);
    const A *tails[2] = {tail + i * tail_stride, tail + other * tail_stride};
    const A *ts[2] = {t + i * t_stride, t + other * t_stride};
    for (int64_t a = 0; a < digits; a += kDigits) {
      // Digits past the last are those of the last, and not kept.
      int64_t at[kDigits];
#pragma GCC unroll 8
      for (int c = 0; c < kDigits; ++c) at[c] = std::min(a + c, digits - 1) * width;
      Vec<A> sum[W] = {};
      const auto add = [&]<bool shared>(int64_t w, auto part) {
        const Vec<A> x[2] = {load(tails[0] + w), load(tails[1] + w)};
#pragma GCC unroll 8
        for (int c = 0; c < kDigits; ++c) {
          const Vec<A> v = load(ts[0] + at[c] + w);
          sum[c] += part(v * x[0]);
          sum[kDigits + c] += part((shared ? v : load(ts[1] + at[c] + w)) * x[1]);
        }
      };
      const auto all = [&]<bool shared>() {
        int64_t w = 0;
        for (; w + W <= width; w += W)
          add.template operator()<shared>(w, [](Vec<A> v) { return v; });
        if (w < width)
          add.template operator()<shared>(w, [&](Vec<A> v) {
            return first_lanes<A>(v, width - w, std::make_integer_sequence<int, W>());
          });
      };
      if (t_stride) {
        all.template operator()<false>();
      } else {
        all.template operator()<true>();
      }
      A sums[W];
      store(sums, reduce_lanes<A>(sum, Plus()));
#pragma GCC unroll 8
      for (int c = 0; c < kDigits; ++c) {
        if (a + c >= digits) continue;
        to[i * size + a + c] = sums[c];
        to[other * size + a + c] = sums[kDigits + c];
      }
    }
  }
}

// left_i[w] = sum over a of factor_i[a] * t_i[a][w].
template <class A>
void contract(const A* t, const A* factor, int64_t rank, int64_t size, int64_t digits,
              int64_t width, A* left) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < rank; ++i, t += digits * width, factor += size, left += width)
    for (int64_t w = 0; w < width; w += W) {  // upwards: see tensor_product
      Vec<A> sum = {};
      for (int64_t a = 0; a < digits; ++a) sum += splat(factor[a]) * load(t + a * width + w);
      store(left + w, sum);
    }
}

template <class A, int... lane>
LK_INLINE Vec<A> swap_halves(Vec<A> v, std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  return __builtin_shufflevector(v, v, ((lane + W / 2) % W)...);
}

// The even lanes of the result are the first half of v, the odd ones the second.
template <class A, int... lane>
LK_INLINE Vec<A> interleave_halves(Vec<A> v, std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  return __builtin_shufflevector(v, v, (lane % 2 * (W / 2) + lane / 2)...);
}

// `dots` and `contract` where size, digits and width are half a vector: two digits lie in one.
template <class A>
void split_halves(const A* t, const A* factor, const A* tail, int64_t rank, A* to, A* left) {
  constexpr int W = kLanes<A>, kSize = W / 2, kVectors = kSize / 2;
  constexpr auto kAll = std::make_integer_sequence<int, W>();
  for (int64_t i = 0; i < rank; i += 2) {
    Vec<A> products[W];  // the first half of them, a digit in the even lanes, one in the odd ones
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const int64_t row = std::min(i + r, rank - 1);
      const Vec<A> tails = spread<A, true>(tail + row * kSize, kSize, kAll);
      Vec<A> sum = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> two = load(t + (row * kVectors + v) * W);
        products[r * kVectors + v] = interleave_halves<A>(two * tails, kAll);
        sum += two * spread<A, false>(factor + row * kSize + 2 * v, kSize, kAll);
      }
      store(left + row * kSize, sum + swap_halves<A>(sum, kAll));  // upwards
    }
    A sums[W];
    store(sums, reduce_lanes<A, 2>(products, Plus()));
    std::copy_n(sums, std::min<int64_t>(2, rank - i) * kSize, to + i * kSize);
  }
}

// The gradients that go on to the factors left, [rank, width[k + 1]] each.
template <class A>
struct GradScratch {
  A* left[2];

  GradScratch(const TensorProduct& p, Arena<A>& arena) {
    for (A*& buffer : left) buffer = arena.take(p.rank * p.width[1]);
  }
};

// shares [order, rank, size] = the gradient of the factors of one row, for `g` [width[0]] its own.
template <class A>
void factor_grads(const TensorProduct& p, const RowScratch<A>& row, const A* g,
                  const GradScratch<A>& scratch, A* shares) {
  constexpr int64_t kHalf = kLanes<A> / 2;
  const int last = p.order - 1;
  const int64_t size = p.size, share = p.rank * size;
  for (int k = 0; k <= last; ++k)
    if (p.used[k] < size) std::fill(shares + k * share, shares + (k + 1) * share, A(0));
  const A* t = g;
  for (int k = 0; k < last; ++k) {
    const int64_t digits = p.used[k], width = p.width[k + 1];
    const A *factor = row.factors[k], *tail = row.tails[k + 1];
    A *left = scratch.left[k % 2], *to = shares + k * share;
    if (k > 0 && kHalf > 1 && size == kHalf && digits == size && width == size) {
      split_halves(t, factor, tail, p.rank, to, left);
    } else {
      dots(t, k ? digits * width : 0, tail, tail_stride(p, k + 1), p.rank, size, digits, width, to);
      if (k > 0) {
        contract(t, factor, p.rank, size, digits, width, left);
      } else {
        multiply<A>({factor, size, 1}, t, width, left, digits, p.rank, width);
      }
    }
    t = left;
  }
  if (p.used[last] == size) {
    std::copy_n(t, share, shares + last * share);
  } else {
    for (int64_t i = 0; i < p.rank; ++i)
      std::copy_n(t + i * p.used[last], p.used[last], shares + last * share + i * size);
  }
}

// sum += row, or for the first one sum = row.
template <class S, class A>
LK_INLINE void add_row(const S* row, A* sum, int64_t n, bool first) {
  if (first) {
    sum_over<A>(n, [&](int64_t j, auto kind) { return keep(sum + j, read(kind, row + j)); });
  } else {
    sum_over<A>(n, [&](int64_t j, auto kind) {
      return keep(sum + j, read(kind, sum + j) + read(kind, row + j));
    });
  }
}

template <class S>
bool make_grads(const TensorProduct& p, const EmbeddingRows& end, const TensorProductGrads& out,
                const Piece* pieces, int64_t count, void* memory) {
  using A = typename Accumulator<S>::type;
  const int64_t n = p.features;
  Arena<A> arena{static_cast<A*>(memory)};
  RowScratch<A> scratch(p, arena);
  A* summed = arena.take(n);
  A* g = arena.take(p.width[0]);
  const GradScratch<A> left(p, arena);
  std::fill(g + n, g + p.width[0], A(0));
  A* sums = static_cast<A*>(out.weight);
  const uint32_t last = pieces[count - 1].end - 1;
  const auto row_of = [&](uint32_t at) {
    return static_cast<const S*>(out.grad) + out.positions[at] * n;
  };
  for (int64_t i = 0; i < count; ++i) {
    const Piece& piece = pieces[i];
    int64_t index[kMostOrder] = {};
    if (!p.morphemes_of(piece.id, index)) return false;
    prefetch_pieces<S>(p, pieces + i, count - i);
    read_all<S>(p, index, scratch);
    if (end.norm != kNoNorm) {
      make_row(p, scratch);
    } else {
      make_tails(p, scratch);
    }
    for (uint32_t at = piece.begin; at < piece.end; ++at) {
      const S* upstream = row_of(at);
      const S* next = row_of(std::min(at + kRowsAhead, last));
      for (int64_t j = 0; j < n; j += 64 / sizeof(S)) __builtin_prefetch(next + j, 0, 2);
      if (!out.rows) {
        add_row(upstream, g, n, at == piece.begin);
        continue;
      }
      A* row = static_cast<A*>(out.rows) + (at - out.first) * n;
      add_row(upstream, row, n, true);
      if (end.norm != kNoNorm) {
        add_rows<S>(end, out.positions[at], scratch.made, summed);
        norm_grad(end, summed, row, sums, row);
      }
      add_row(row, g, n, at == piece.begin);
    }
    if (!out.rows && end.norm != kNoNorm) norm_grad(end, scratch.made, g, sums, g);
    factor_grads(p, scratch, g, left,
                 static_cast<A*>(out.shares) + i * p.order * p.rank * p.size);
  }
  return true;
}

template <class A>
void add_listed(const void* from, const uint32_t* positions, int64_t count, int64_t stride,
                int64_t length, void* to) {
  constexpr int W = kLanes<A>, kVectors = 8;
  A* sums = static_cast<A*>(to);
  const auto row = [&](int64_t i) { return static_cast<const A*>(from) + positions[i] * stride; };
  int64_t j = 0;
  const auto some = [&]<int vectors>() {
    Vec<A> sum[vectors] = {};
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] += load(row(i) + j + v * W);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(sums + j + v * W, load(sums + j + v * W) + sum[v]);
    j += vectors * W;
  };
  while (j + kVectors * W <= length) some.template operator()<kVectors>();
  while (j + W <= length) some.template operator()<1>();
  for (; j < length; ++j) {
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += row(i)[j];
    sums[j] += sum;
  }
}

template <class S>
size_t scratch_bytes(const TensorProduct& p) {
  using A = typename Accumulator<S>::type;
  Arena<A> arena{nullptr};
  RowScratch<A>(p, arena);
  GradScratch<A>(p, arena);
  arena.take(p.features);
  arena.take(p.width[0]);
  return arena.taken * sizeof(A);
}

template <class S>
constexpr TensorProductKernels kKernels = {scratch_bytes<S>, make_rows<S>, make_grads<S>,
                                           add_listed<typename Accumulator<S>::type>};

}  // namespace

const TensorProductKernels LEAN_KERNELS_ISA::tensor_product[kDtypes] = {
    kKernels<float>, kKernels<BFloat16>, kKernels<Float16>, kKernels<double>};

}  // namespace lean_kernels

// SPDX-License-Identifier: Apache-2.0
// Checks the kernels of one instruction set (-DLEAN_KERNELS_ISA=...) against plain sums in float64,
// without torch, so that it also runs where there is only an emulator. isa_check.sh builds it.
#include "isa_check.h"

#include <numeric>
#include <random>

#include "../csrc/cpu/isa.h"

namespace lean_kernels {
int wrong_narrowings_bfloat16(), wrong_narrowings_float16();  // of store_narrow, against narrow
}
using namespace lean_kernels;

#define LEAN_KERNELS_STRING(name) #name
#define LEAN_KERNELS_NAME(isa) LEAN_KERNELS_STRING(isa)

namespace {

constexpr const char* kName = LEAN_KERNELS_NAME(LEAN_KERNELS_ISA);

std::mt19937 rng(1);

// rows x cols values that S holds exactly; NaN lies between the rows where ld > cols.
template <class S>
Values random_rows(int64_t rows, int64_t cols, int64_t ld) {
  Values v((rows - 1) * ld + cols, NAN);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) v[r * ld + c] = double(S(int32_t(rng()) * 0x1p-31));
  return v;
}

double activate(int code, double v) {
  switch (code) {
    case 1: return v < 0 ? 0 : v;
    case 2: return 0.5 * v * (1 + std::erf(v * M_SQRT1_2));
    case 3: return 0.5 * v * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (v + 0.044715 * v * v * v)));
    case 4: return v / (1 + std::exp(-v));
    default: return v;
  }
}

// Where a block's element (o, i) lies, and blocks permuted in memory or not.
struct Layout {
  int64_t block_stride, out_stride, in_stride;
  bool permuted;
};

// A random block-sparse matrix [out_features, in_features] whose second group is empty.
struct Matrix {
  int64_t block_out, block_in, groups, inputs, out_features, in_features, most = 0;
  std::vector<int32_t> ptr{0}, index, position;
  Values blocks;  // [entry][block_out][block_in], zero past the edges

  template <class S>
  static Matrix random(int64_t bo, int64_t bi, int64_t groups, int64_t inputs, bool ragged,
                       double density) {
    Matrix m;
    m.block_out = bo, m.block_in = bi, m.groups = groups, m.inputs = inputs;
    m.out_features = groups * bo - (ragged ? bo / 2 : 0);
    m.in_features = inputs * bi - (ragged ? bi / 2 : 0);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < inputs; ++i)
        if (g != 1 && rng() * 0x1p-32 < density) m.index.push_back(int32_t(i));
      m.ptr.push_back(int32_t(m.index.size()));
      m.most = std::max<int64_t>(m.most, m.ptr[g + 1] - m.ptr[g]);
      for (int64_t e = m.ptr[g]; e < m.ptr[g + 1]; ++e)
        for (int64_t o = 0; o < bo; ++o)
          for (int64_t i = 0; i < bi; ++i) {
            const bool inside = g * bo + o < m.out_features && m.index[e] * bi + i < m.in_features;
            m.blocks.push_back(inside ? double(S(int32_t(rng()) * 0x1p-31)) : 0.0);
          }
    }
    m.position.resize(m.index.size());
    std::iota(m.position.begin(), m.position.end(), 0);
    std::shuffle(m.position.begin(), m.position.end(), rng);
    return m;
  }

  std::vector<Layout> layouts() const {
    const int64_t size = block_out * block_in, wide = 2 * block_out + 1;
    return {{size, 1, block_out, false},    {size, 1, block_out, true},
            {size, block_in, 1, false},     {size, block_in, 1, true},
            {size + 5, 1, block_out, true}, {wide * block_in, 2, wide, false}};
  }

  Values stored(const Layout& l) const {
    Values v(index.size() * l.block_stride, NAN);
    size_t from = 0;
    for (size_t e = 0; e < index.size(); ++e)
      for (int64_t o = 0; o < block_out; ++o)
        for (int64_t i = 0; i < block_in; ++i)
          v[(l.permuted ? position[e] : e) * l.block_stride + o * l.out_stride + i * l.in_stride] =
              blocks[from++];
    return v;
  }

  Values product(const Values& x, int64_t ldx, int64_t rows) const {
    Values y(rows * out_features);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t e = ptr[g]; e < ptr[g + 1]; ++e) {
        const int64_t out = g * block_out, in = index[e] * block_in;
        const int64_t width = std::min(block_in, in_features - in);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t o = 0; o < std::min(block_out, out_features - out); ++o) {
            const double* w = &blocks[(e * block_out + o) * block_in];
            y[r * out_features + out + o] +=
                std::inner_product(w, w + width, &x[r * ldx + in], 0.0);
          }
      }
    return y;
  }

  BlockMatrix view(const void* values, const Layout& l) const {
    return {values,       ptr.data(), index.data(), l.permuted ? position.data() : nullptr,
            groups,       block_out,  block_in,     l.block_stride,
            l.out_stride, l.in_stride};
  }
};

// Runs p cut at the given rows and groups, each part with no more scratch than it asked for.
void run_product(const BlockSparseKernels& kernels, const Product& p,
                 const std::vector<int64_t>& row_cuts, const std::vector<int64_t>& group_cuts) {
  constexpr size_t kMost = 16 << 20;
  static Guarded<char> scratch(kMost);
  for (size_t r = 0; r + 1 < row_cuts.size(); ++r)
    for (size_t g = 0; g + 1 < group_cuts.size(); ++g) {
      const Range range{row_cuts[r], row_cuts[r + 1], group_cuts[g], group_cuts[g + 1]};
      if (range.row_begin == range.row_end || range.group_begin == range.group_end) continue;
      const size_t bytes = kernels.product_scratch(p, range.row_end - range.row_begin);
      if (bytes > kMost) std::abort();
      char* const from = scratch.data() + kMost - bytes;
      std::memset(from, 0xff, bytes);
      kernels.product(p, range, from);
    }
}

// Products of one matrix with one x, bias and residual, and the sums that are right for them.
template <class S>
class ProductCheck {
 public:
  ProductCheck(Group& group, const BlockSparseKernels& kernels, const Matrix& m, int64_t rows)
      : group_(group),
        kernels_(kernels),
        m_(m),
        most_(rows),
        x_(random_rows<S>(rows, m.in_features, ldx())),
        bias_(random_rows<S>(1, m.out_features, 0)),
        residual_(random_rows<S>(rows, m.out_features, ldr())),
        sums_(m.product(x_, ldx(), rows)),
        x_in_(x_),
        bias_in_(bias_),
        residual_in_(residual_),
        layouts_(m.layouts()),
        y_(y_size(rows)),
        parts_(y_size(rows)) {
    for (const Layout& layout : layouts_) weights_.emplace_back(m.stored(layout));
  }

  // The last `rows` rows; whole, and in parts whose results must be the same bits.
  void run(size_t layout, int64_t rows, int activation, bool bias, bool residual) {
    const int64_t n = m_.out_features, skip = most_ - rows;
    S* const y = y_.data() + skip * ldy();
    S* const parts = parts_.data() + skip * ldy();
    y_.clear();
    parts_.clear();
    Product p{};
    p.x = x_in_.data() + skip * ldx(), p.ldx = ldx(), p.in_features = m_.in_features;
    p.y = y, p.ldy = ldy(), p.out_features = n, p.rows = rows;
    if (bias) p.bias = bias_in_.data();
    if (residual) p.residual = residual_in_.data() + skip * ldr(), p.ldr = ldr();
    p.activation = activation;
    p.w = m_.view(weights_[layout].data(), layouts_[layout]), p.max_entries = m_.most;
    run_product(kernels_, p, {0, rows}, {0, m_.groups});
    p.y = parts;
    run_product(kernels_, p, {0, (rows + 2) / 3, rows}, {0, 1, m_.groups});

    Values got, expected;
    bool same = true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        got.push_back(double(y[r * ldy() + c]));
        expected.push_back(activate(activation, sums_[(skip + r) * n + c] + (bias ? bias_[c] : 0)) +
                           (residual ? residual_[(skip + r) * ldr() + c] : 0));
        if (std::memcmp(&y[r * ldy() + c], &parts[r * ldy() + c], sizeof(S))) same = false;
      }
    for (int64_t i = 0; i < y_size(most_); ++i)
      if ((i < skip * ldy() || i % ldy() >= n) && (!y_.untouched(i) || !parts_.untouched(i)))
        same = false;
    group_.add(same ? error_of<S>(got, expected) : NAN);
  }

  size_t layouts() const { return layouts_.size(); }

 private:
  int64_t ldx() const { return m_.in_features + 3; }
  int64_t ldr() const { return m_.out_features + 2; }
  int64_t ldy() const { return m_.out_features + 5; }
  int64_t y_size(int64_t rows) const { return (rows - 1) * ldy() + m_.out_features; }

  Group& group_;
  const BlockSparseKernels& kernels_;
  const Matrix& m_;
  int64_t most_;
  Values x_, bias_, residual_, sums_;
  Guarded<S> x_in_, bias_in_, residual_in_;
  std::vector<Layout> layouts_;
  Guarded<S> y_, parts_;
  std::vector<Guarded<S>> weights_;
};

template <class S>
void check_product(const BlockSparseKernels& kernels, const std::string& name, double limit,
                   int64_t bo, int64_t bi) {
  Group group{name + " product", limit};
  for (bool ragged : {false, true}) {
    const Matrix m = Matrix::random<S>(bo, bi, 3 + 36 / bo, 3 + 36 / bi, ragged, 0.6);
    ProductCheck<S> check(group, kernels, m, 75);
    for (int64_t rows = 1; rows <= 26; ++rows)  // every height of tile
      check.run(rows % 2, rows, 0, rows % 3, false);
    check.run(0, 75, 0, true, false);
    for (size_t layout = 0; layout < check.layouts(); ++layout)
      for (int activation = 0; activation <= 4; ++activation) {
        check.run(layout, 2, activation, true, activation % 2);
        check.run(layout, 13, activation, activation % 3, activation % 2 == 0);
      }
  }
  // More inputs than one chain of sums, and more weights than one pass keeps in L2.
  const Matrix m = Matrix::random<S>(bo, bi, 3, 2300 / bi, true, 1);
  ProductCheck<S> check(group, kernels, m, 5);
  for (size_t layout = 0; layout < check.layouts(); ++layout) check.run(layout, 5, 0, true, false);
}

template <class S>
void check_outer(const BlockSparseKernels& kernels, const std::string& name, double limit,
                 int64_t bo, int64_t bi) {
  using A = std::conditional_t<sizeof(S) == 8, double, float>;
  Group group{name + " outer", limit};
  for (int variant = 0; variant < 4; ++variant)
    for (int64_t rows : {1, 7, 75}) {
      const bool ragged = variant / 2, out_fastest = variant % 2;
      const int64_t out_stride = out_fastest ? 1 : bi, in_stride = out_fastest ? bo : 1;
      const Matrix m = Matrix::random<S>(bo, bi, 3 + 20 / bo, 3 + 20 / bi, ragged, 0.6);
      const int64_t ldg = m.out_features + 3, ldx = m.in_features + 1;
      const Values grad = random_rows<S>(rows, m.out_features, ldg);
      const Values x = random_rows<S>(rows, m.in_features, ldx);
      const Guarded<S> g(grad), in(x);
      const Guarded<A> out(m.blocks.size());
      BlockOuter p{};
      p.grad = g.data(), p.ldg = ldg, p.out_features = m.out_features;
      p.x = in.data(), p.ldx = ldx, p.in_features = m.in_features, p.rows = rows;
      p.ptr = m.ptr.data(), p.index = m.index.data();
      p.block_out = bo, p.block_in = bi, p.out_stride = out_stride, p.in_stride = in_stride;
      p.out = out.data();
      const Guarded<char> scratch(int64_t(kernels.outer_scratch(p)));
      // Tasks may begin within a group.
      const int64_t entries = m.ptr[m.groups], half = entries / 2;
      if (half > 0) kernels.outer(p, 0, half, scratch.data());
      if (half < entries) kernels.outer(p, half, entries, scratch.data());
      Values got, expected;
      for (int64_t gr = 0; gr < m.groups; ++gr)
        for (int64_t e = m.ptr[gr]; e < m.ptr[gr + 1]; ++e)
          for (int64_t i = 0; i < bi; ++i)
            for (int64_t o = 0; o < bo; ++o) {
              const int64_t row = gr * bo + o, col = m.index[e] * bi + i;
              double sum = 0;
              for (int64_t r = 0; r < rows && row < m.out_features && col < m.in_features; ++r)
                sum += grad[r * ldg + row] * x[r * ldx + col];
              got.push_back(double(out[e * bo * bi + o * out_stride + i * in_stride]));
              expected.push_back(sum);
            }
      group.add(error_of<A>(got, expected));
    }
}

template <class S>
void check_column_sums(const BlockSparseKernels& kernels, const std::string& name, double limit) {
  using A = std::conditional_t<sizeof(S) == 8, double, float>;
  Group group{name + " column sums", limit};
  for (int64_t cols : {9, 63, 64, 200})
    for (int64_t rows : {1, 128, 300}) {
      const int64_t ld = cols + 3, half = cols / 2 / kSumColumns * kSumColumns;
      const Values x = random_rows<S>(rows, cols, ld);
      const Guarded<S> in(x);
      const Guarded<A> sums(cols);
      kernels.column_sums(in.data(), ld, rows, 0, half, sums.data());
      kernels.column_sums(in.data(), ld, rows, half, cols, sums.data());
      Values got, expected(cols);
      for (int64_t c = 0; c < cols; ++c) {
        got.push_back(double(sums[c]));
        for (int64_t r = 0; r < rows; ++r) expected[c] += x[r * ld + c];
      }
      group.add(error_of<A>(got, expected));
    }
}

// One n x n block that passes x on, so that what a product does besides summing shows by itself.
template <class S>
class Identity {
 public:
  explicit Identity(int64_t n) : n_(n), values_(size_t(n * n)) {
    for (int64_t i = 0; i < n * n; ++i) values_[i] = S(i % (n + 1) ? 0.0 : 1.0);
  }
  Product product(const S* x, S* y, int64_t rows) const {
    static constexpr int32_t ptr[] = {0, 1}, index[] = {0};
    Product p{};
    p.x = x, p.y = y, p.ldx = p.ldy = p.ldr = p.in_features = p.out_features = n_, p.rows = rows;
    p.w = {values_.data(), ptr, index, nullptr, 1, n_, n_, n_ * n_, 1, n_}, p.max_entries = 1;
    return p;
  }

 private:
  int64_t n_;
  Guarded<S> values_;
};

// Whether products of bfloat16 take subnormal numbers for zero, as vdpbf16ps does; see BFloat16Pairs.
bool flushes_bfloat16() {
#if defined(__x86_64__)
  return std::string(kName) == "avx512" && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// y = x and y = x + residual: every finite value of a half, and sums that need rounding, subnormals
// (where they are kept) and overflow included, come out as IEEE 754 rounds.
template <class S>
void check_rounding(const BlockSparseKernels& kernels, const std::string& name) {
  const bool flushes = std::is_same_v<S, Half<7>> && flushes_bfloat16();
  const auto lost = [&](double v) { return flushes && v != 0 && std::abs(v) < 0x1p-126; };
  constexpr int64_t n = 16, rows = 4096;
  Group group{name + " rounding", 0};
  std::vector<S> finite, other;
  for (int code = 0; code < 0x10000; ++code) {
    S value;
    value.bits = uint16_t(code);
    if ((code & 0x7fff) >= S::kInfinity) value.bits = uint16_t(code & 0x807f);
    finite.push_back(value);
  }
  other = finite;
  std::shuffle(other.begin(), other.end(), rng);
  for (size_t i = 0; i < other.size(); i += 2) {  // of like size, for sums that round and overflow
    const S half(double(finite[i]) * 1.5 * 0x1p-9);
    if ((half.bits & 0x7fff) < S::kInfinity) other[i] = i % 4 ? half : finite[i];
  }
  const Identity<S> identity(n);
  const Guarded<S> y(rows * n);
  Product p = identity.product(finite.data(), y.data(), rows);
  for (bool add : {false, true}) {
    p.residual = add ? other.data() : nullptr;
    run_product(kernels, p, {0, rows}, {0, 1});
    int wrong = 0;
    for (int64_t i = 0; i < rows * n; ++i) {
      const float sum = float(double(finite[i])) + (add ? float(double(other[i])) : 0.0f);
      if (lost(double(finite[i])) || lost(sum)) continue;
      if (!(double(y[i]) == double(S(double(sum))))) ++wrong;
    }
    group.add(wrong);
  }
}

// Activations far from zero, and of a row of NaN, which leaves the other rows alone.
template <class S>
void check_activations(const BlockSparseKernels& kernels, const std::string& name, double limit,
                       int64_t n) {
  constexpr int64_t rows = 37;
  Group group{name + " activations, block " + std::to_string(n), limit};
  const Identity<S> identity(n);
  const Guarded<S> x(rows * n), y(rows * n);
  for (int64_t i = 0; i < rows * n; ++i)
    x[i] = S(i / n == 2 ? NAN : (double(i) / double(rows * n) - 0.5) * 200);
  for (int activation = 0; activation <= 4; ++activation) {
    Product p = identity.product(x.data(), y.data(), rows);
    p.activation = activation;
    run_product(kernels, p, {0, rows}, {0, 1});
    Values got, expected;
    bool same = true;
    for (int64_t i = 0; i < rows * n; ++i) {
      if (std::isnan(double(x[i])) != std::isnan(double(y[i]))) same = false;
      if (std::isnan(double(x[i]))) continue;
      got.push_back(double(y[i]));
      expected.push_back(activate(activation, double(x[i])));
    }
    group.add(same ? error_of<S>(got, expected) : NAN);
  }
}

template <class S>
void check(Dtype dtype, const char* name, double limit, double outer_limit) {
  static constexpr int64_t kShapes[][2] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64},
                                           {64, 16}, {48, 24}, {1, 16},  {16, 1},    {4, 16},
                                           {8, 8},   {20, 12}, {3, 5}};
  const BlockSparseKernels& kernels = LEAN_KERNELS_ISA::block_sparse[dtype];
  for (const auto& [bo, bi] : kShapes) {
    const std::string label =
        std::string(name) + " " + std::to_string(bo) + "x" + std::to_string(bi);
    check_product<S>(kernels, label, limit, bo, bi);
    check_outer<S>(kernels, label, outer_limit, bo, bi);
  }
  check_column_sums<S>(kernels, name, outer_limit);
  if constexpr (kIsHalf<S>) check_rounding<S>(kernels, name);
  for (int64_t block : {32, 16, 4, 3}) check_activations<S>(kernels, name, limit, block);
}

}  // namespace

int main() {
#if defined(__x86_64__)
  std::printf("processor: avx2 %d, fma %d, f16c %d, avx512 f %d, bw %d, vl %d, dq %d\n",
              !!__builtin_cpu_supports("avx2"), !!__builtin_cpu_supports("fma"),
              !!__builtin_cpu_supports("f16c"), !!__builtin_cpu_supports("avx512f"),
              !!__builtin_cpu_supports("avx512bw"), !!__builtin_cpu_supports("avx512vl"),
              !!__builtin_cpu_supports("avx512dq"));
#endif
  std::printf("kernels: %s\n", kName);
  std::fflush(stdout);
  std::printf("float32 lanes: %g\n", LEAN_KERNELS_ISA::fma_peak(1) / 20);
  check<float>(kFloat32, "float32", 1e-6, 1e-6);
  check<Half<7>>(kBFloat16, "bfloat16", 1, 1e-6);
  check<Half<10>>(kFloat16, "float16", 1, 1e-6);
  check<double>(kFloat64, "float64", 1e-14, 1e-14);
  Group{"bfloat16 whole vectors", 0}.add(wrong_narrowings_bfloat16());
  Group{"float16 whole vectors", 0}.add(wrong_narrowings_float16());
  std::printf("%s: %s\n", kName, failures ? "FAILED" : "all passed");
  return failures ? 1 : 0;
}

// SPDX-License-Identifier: Apache-2.0
// What isa_check.cpp measures with: half formats, buffers that show stray accesses, errors, counts.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

using Values = std::vector<double>;

// bfloat16 (M = 7) and float16 (M = 10): a sign, 15 - M bits of exponent, M bits of mantissa.
template <int M>
struct Half {
  static constexpr int kMantissaBits = M;
  static constexpr int kBias = (1 << (14 - M)) - 1, kInfinity = ((1 << (15 - M)) - 1) << M;
  uint16_t bits;

  Half() = default;
  explicit Half(double v) {
    int code = kInfinity;
    if (std::isnan(v)) {
      code += 1;
    } else if (std::isfinite(v)) {
      const int digits = int(std::nearbyint(std::ldexp(std::fabs(v), M - exponent_of(v))));
      code = std::min(((exponent_of(v) + kBias - 1) << M) + digits, kInfinity);
    }
    bits = uint16_t(code | (std::signbit(v) ? 0x8000 : 0));
  }
  explicit operator double() const {
    const int code = bits & 0x7fff, exponent = code >> M, digits = code & ((1 << M) - 1);
    double size = exponent ? std::ldexp(digits + (1 << M), exponent - kBias - M)
                           : std::ldexp(digits, 1 - kBias - M);
    if (code >= kInfinity) size = code > kInfinity ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
  }
  static int exponent_of(double v) { return v ? std::max(std::ilogb(v), 1 - kBias) : 1 - kBias; }
};

template <class S>
constexpr bool kIsHalf = sizeof(S) == 2;

// An array that starts out as NaN and ends at an unmapped page: an access past its end crashes, and
// a read of what nobody wrote shows.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : bytes_(count * sizeof(T)) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    end_ = (bytes_ + page - 1) / page * page;
    void* at =
        mmap(nullptr, end_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + end_, page, PROT_NONE)) {
      std::perror("mmap");
      std::exit(2);
    }
    base_ = static_cast<char*>(at);
    clear();
  }
  explicit Guarded(const Values& values) : Guarded(values.size()) {
    for (size_t i = 0; i < values.size(); ++i) data()[i] = T(values[i]);
  }
  Guarded(Guarded&& from)
      : bytes_(from.bytes_), end_(from.end_), base_(std::exchange(from.base_, nullptr)) {}
  ~Guarded() {
    if (base_) munmap(base_, end_ + size_t(sysconf(_SC_PAGESIZE)));
  }

  T* data() const { return reinterpret_cast<T*>(base_ + end_ - bytes_); }
  T& operator[](int64_t i) const { return data()[i]; }
  void clear() { std::memset(base_, 0xff, end_); }
  bool untouched(int64_t i) const {
    unsigned char poison[sizeof(T)];
    std::memset(poison, 0xff, sizeof(T));
    return !std::memcmp(&data()[i], poison, sizeof(T));
  }

 private:
  size_t bytes_, end_;
  char* base_;
};

// Relative error (root mean square) for float32 and float64; for the halves the worst element's
// error in units of correct rounding plus the noise of a float32 sum. A NaN gives NaN.
template <class S>
double error_of(const Values& got, const Values& expected) {
  double error = 0, total = 0, worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    total += expected[i] * expected[i];
  }
  if constexpr (kIsHalf<S>) {
    const double noise = 2e-6 * std::sqrt(total / double(got.size())) + 1e-30;
    for (size_t i = 0; i < got.size(); ++i) {
      const double half_unit = std::ldexp(1, S::exponent_of(expected[i]) - S::kMantissaBits - 1);
      const double off = std::fabs(got[i] - expected[i]) / (half_unit + noise);
      if (std::isnan(off)) return NAN;
      worst = std::max(worst, off);
    }
    return worst;
  }
  return error == 0 ? 0 : std::sqrt(error / total);
}

inline int failures = 0;

// One line of output: a group of cases with one limit on the error.
struct Group {
  std::string name;
  double limit;
  int cases = 0, failed = 0;
  double worst = 0;

  void add(double error) {
    ++cases;
    if (!(error <= limit)) ++failed;
    if (!(error <= worst) && !std::isnan(worst)) worst = error;
  }
  ~Group() {
    std::printf("%s %s: %d of %d cases, worst error %.2g (limit %.2g)\n", failed ? "FAIL" : "PASS",
                name.c_str(), cases - failed, cases, worst, limit);
    std::fflush(stdout);
    failures += failed;
  }
};

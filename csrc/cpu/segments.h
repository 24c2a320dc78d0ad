// SPDX-License-Identifier: Apache-2.0
// Rows of a table and where they occur: the transpose of a list of ids.
#pragma once

#include <cstdint>
#include <vector>

namespace lean_kernels {

struct Occurrence {
  int64_t row, place;
};

// Stable radix sort by row; rows are in [0, rows).
inline void sort_by_row(std::vector<Occurrence>& items, int64_t rows) {
  constexpr int kBits = 11;
  std::vector<Occurrence> other(items.size());
  for (int shift = 0; shift < 63 && (rows - 1) >> shift > 0; shift += kBits) {
    std::vector<int64_t> start((1 << kBits) + 1);
    const auto digit = [&](const Occurrence& o) { return o.row >> shift & ((1 << kBits) - 1); };
    for (const Occurrence& o : items) ++start[digit(o) + 1];
    for (int i = 0; i < 1 << kBits; ++i) start[i + 1] += start[i];
    for (const Occurrence& o : items) other[start[digit(o)]++] = o;
    items.swap(other);
  }
}

}  // namespace lean_kernels

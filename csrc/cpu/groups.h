// SPDX-License-Identifier: Apache-2.0
// Equal keys brought together, in time linear in their number.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace lean_kernels {

// Positions grouped by their key: groups in the order of first appearance, positions ascending.
struct Groups {
  std::vector<int64_t> keys;       // of each group
  std::vector<uint32_t> begins;    // group g has the positions at begins[g] to begins[g + 1]
  std::vector<uint32_t> positions;

  int64_t count() const { return int64_t(keys.size()); }

  // key(i) of the positions i < count, fewer than 2^31; those with a negative one are left out.
  template <class Key>
  void build(int64_t count, const Key& key) {
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * count) ++bits;
    const size_t mask = (size_t(1) << bits) - 1;
    slots_.assign(mask + 1, 0);
    group_of_.resize(count);
    keys.clear();
    begins.clear();
    uint32_t grouped = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = key(i);
      if (k < 0) {
        group_of_[i] = kNone;
        continue;
      }
      ++grouped;
      size_t at = size_t(uint64_t(k) * 0x9e3779b97f4a7c15u >> (64 - bits));
      while (slots_[at] && keys[slots_[at] - 1] != k) at = (at + 1) & mask;
      if (!slots_[at]) {
        keys.push_back(k);
        begins.push_back(0);
        slots_[at] = uint32_t(keys.size());
      }
      const uint32_t group = slots_[at] - 1;
      group_of_[i] = group;
      ++begins[group];
    }
    positions.resize(grouped);
    uint32_t sum = 0;
    for (uint32_t& size : begins) sum += std::exchange(size, sum);
    for (int64_t i = 0; i < count; ++i)
      if (group_of_[i] != kNone) positions[begins[group_of_[i]]++] = uint32_t(i);
    begins.insert(begins.begin(), 0);
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t(0);
  std::vector<uint32_t> slots_;  // 1 + the group whose key hashes there; 0: none
  std::vector<uint32_t> group_of_;
};

}  // namespace lean_kernels

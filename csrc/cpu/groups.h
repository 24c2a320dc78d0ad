// SPDX-License-Identifier: Apache-2.0
// Equal keys brought together, in time linear in their number.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "embedding_row.h"

namespace lean_kernels {

// Positions grouped by their key: groups in the order of first appearance, positions ascending.
struct Groups {
  std::vector<int64_t> keys;     // of each group
  std::vector<uint32_t> begins;  // group g has the positions at begins[g] to begins[g + 1]
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
    keys.resize(count);
    begins.assign(count + 1, 0);
    uint32_t groups = 0, grouped = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = key(i);
      if (k < 0) {
        group_of_[i] = kNone;
        continue;
      }
      ++grouped;
      size_t at = size_t(uint64_t(k) * 0x9e3779b97f4a7c15u >> (64 - bits));
      uint32_t slot = slots_[at];
      // Whether a key is new is as good as random, so that no branch depends on it.
      while ((slot != 0) & (keys[slot - (slot != 0)] != k)) slot = slots_[at = (at + 1) & mask];
      const uint32_t group = slot ? slot - 1 : groups;
      groups += slot == 0;
      slots_[at] = group + 1;
      keys[group] = k;
      group_of_[i] = group;
      ++begins[group];
    }
    keys.resize(groups);
    begins.resize(groups + 1);
    positions.resize(grouped);
    uint32_t end = 0;
    for (uint32_t& begin : begins) {
      const uint32_t size = begin;
      begin = end;
      end += size;
    }
    // Moves each begin to its group's end, which is the next one's begin.
    for (int64_t i = 0; i < count; ++i)
      if (group_of_[i] != kNone) positions[begins[group_of_[i]]++] = uint32_t(i);
    std::copy_backward(begins.begin(), begins.end() - 1, begins.end());
    begins[0] = 0;
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t(0);
  std::vector<uint32_t> slots_;  // 1 + the group whose key hashes there; 0: none
  std::vector<uint32_t> group_of_;
};

// Positions grouped by id, those of a frequent one in several pieces, for threads to share and for
// sums over them not to grow long.
struct Pieces {
  static constexpr uint32_t kMost = 64;  // positions

  Groups groups;
  std::vector<Piece> pieces;  // those of an id follow one another

  int64_t count() const { return int64_t(pieces.size()); }

  // `ids` as in Ids; the id `except` is left out.
  template <class Ids>
  void build(const Ids& ids, int64_t except = -1) {
    groups.build(ids.count, [&](int64_t i) { return ids[i] == except ? -1 : ids[i]; });
    pieces.clear();
    for (int64_t g = 0; g < groups.count(); ++g) {
      const uint32_t end = groups.begins[g + 1];
      for (uint32_t at = groups.begins[g]; at < end; at += kMost)
        pieces.push_back({groups.keys[g], at, std::min(at + kMost, end)});
    }
  }
};

// Kept from call to call, like thread_scratch.
inline Pieces& thread_pieces() {
  thread_local Pieces pieces;
  return pieces;
}

}  // namespace lean_kernels

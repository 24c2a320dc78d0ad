// SPDX-License-Identifier: Apache-2.0
// Places of a batch grouped by id, so that what is done per row of a table is done once per group.
#pragma once

#include <bit>
#include <vector>

#include "embedding_host.h"

namespace lean_kernels {

struct IdGroups {
  // Places in a group: those of a frequent id make several groups, for threads to share.
  static constexpr int32_t kMost = 64;

  std::vector<int64_t> id, first;  // of each group
  std::vector<int32_t> distinct;   // of each group: the number of its id
  std::vector<int64_t> next;       // of each place: the next of its group, -1 at the end
  std::vector<int64_t> count;      // of each distinct id: its places

  int64_t size() const { return int64_t(id.size()); }

  // Groups in order of their first place, places in order within them. Places of `skipped` are left
  // out. A hash table: the number of rows of the table does not matter.
  explicit IdGroups(const Ids& ids, int64_t skipped = -1) : next(ids.count, -1) {
    struct Slot {
      int64_t key;  // id + 1; 0: empty
      int32_t group, distinct;
    };
    const int bits = std::max(4, int(std::bit_width(uint64_t(2 * ids.count))));
    std::vector<Slot> slots(size_t(1) << bits);
    std::vector<int64_t> last;
    std::vector<int32_t> places;
    for (int64_t i = 0; i < ids.count; ++i) {
      const int64_t value = ids[i];
      if (value == skipped) continue;
      size_t at = uint64_t(value) * 0x9e3779b97f4a7c15u >> (64 - bits);
      while (slots[at].key && slots[at].key != value + 1) at = (at + 1) & (slots.size() - 1);
      Slot& slot = slots[at];
      if (!slot.key) {
        slot = {value + 1, -1, int32_t(count.size())};
        count.push_back(0);
      }
      ++count[slot.distinct];
      if (slot.group < 0 || places[slot.group] == kMost) {
        slot.group = int32_t(id.size());
        id.push_back(value);
        first.push_back(i);
        last.push_back(i);
        distinct.push_back(slot.distinct);
        places.push_back(1);
      } else {
        next[last[slot.group]] = i;
        last[slot.group] = i;
        ++places[slot.group];
      }
    }
  }
};

}  // namespace lean_kernels

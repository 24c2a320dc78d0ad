// SPDX-License-Identifier: Apache-2.0
// ngram_lookup on CPU: words, their hashes, those of their n-grams, and what a vocabulary calls
// them, in one pass over each text. ops/ngram_lookup/reference.py says the same in Python.
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "host.h"

namespace lean_kernels {
namespace {

constexpr const char* kOp = "ngram_lookup";
constexpr int kMaxN = 8;
constexpr int64_t kTaskItems = 1 << 13;  // bytes or tokens: tasks small enough to balance
constexpr int kAhead = 16;               // look-ups under way, since each misses the caches

// What a byte is. ASCII capitals become small ones.
enum Class : uint8_t { kSeparator, kWord, kMark };
constexpr std::array<Class, 256> kClasses = [] {
  std::array<Class, 256> classes{};
  for (int c = 0x21; c < 0x7f; ++c) {
    const bool letter = ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z');
    classes[c] = letter || ('0' <= c && c <= '9') || c == '\'' ? kWord : kMark;
  }
  for (int c = 0x80; c < 0x100; ++c) classes[c] = kWord;
  return classes;
}();

// FNV-1a.
constexpr uint64_t kBasis = 0xcbf29ce484222325, kPrime = 0x100000001b3;
uint64_t add_byte(uint64_t hash, uint8_t c) {
  return (hash ^ ('A' <= c && c <= 'Z' ? c + 32 : c)) * kPrime;
}

// splitmix64's last step.
uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// Calls use(hash) for every word.
template <class Use>
void each_word(const uint8_t* at, const uint8_t* end, const Use& use) {
  while (at < end) {
    const Class kind = kClasses[*at];
    if (kind == kSeparator) {
      ++at;
      continue;
    }
    uint64_t hash = add_byte(kBasis, *at++);
    if (kind == kWord)
      for (; at < end && kClasses[*at] == kWord; ++at) hash = add_byte(hash, *at);
    use(hash);
  }
}
template <class Use>
void each_word(const int64_t* at, const int64_t* end, const Use& use) {
  for (; at < end; ++at) use(uint64_t(*at));
}

// Hashes of the n-grams that end at each word, short ones first.
class Ngrams {
 public:
  Ngrams(int64_t shortest, int64_t longest) : shortest_(shortest), longest_(longest) {}

  template <class Use>
  void add(uint64_t word, const Use& use) {
    known_ = std::min<int64_t>(known_ + 1, longest_);
    for (int64_t n = known_ - 1; n >= 0; --n)
      ending_[n] = mix((n ? ending_[n - 1] : 0) * 0x9e3779b97f4a7c15 + word);
    for (int64_t n = shortest_; n <= known_; ++n) use(ending_[n - 1]);
  }

 private:
  int64_t shortest_, longest_, known_ = 0;
  uint64_t ending_[kMaxN];  // hash of the n-gram of n + 1 words that ends at the last one
};

// Open addressing: a number for each of many hashes, -1 where a slot is free.
struct Slot {
  uint64_t hash;
  int64_t number;
};
struct Slots {
  const Slot* data;
  uint64_t mask;

  void fetch(uint64_t hash) const { __builtin_prefetch(data + (hash & mask)); }
  int64_t find(uint64_t hash) const {
    uint64_t at = hash & mask;
    for (uint64_t tried = 0; tried <= mask; ++tried, at = (at + 1) & mask)
      if (data[at].number < 0 || data[at].hash == hash) return data[at].number;
    return -1;
  }
};

// Appends the numbers of those of the hashes given to it that have one.
class Finder {
 public:
  Finder(const Slots& slots, std::vector<int64_t>& found) : slots_(slots), found_(found) {}

  void add(uint64_t hash) {
    slots_.fetch(hash);
    uint64_t& place = waiting_[count_ % kAhead];
    if (count_++ >= kAhead) settle(place);
    place = hash;
  }
  void finish() {
    for (uint64_t i = count_ - std::min<uint64_t>(count_, kAhead); i < count_; ++i)
      settle(waiting_[i % kAhead]);
  }

 private:
  void settle(uint64_t hash) {
    const int64_t number = slots_.find(hash);
    if (number >= 0) found_.push_back(number);
  }
  const Slots& slots_;
  std::vector<int64_t>& found_;
  uint64_t waiting_[kAhead], count_ = 0;
};

struct Request {
  int64_t shortest, longest, buckets;
  std::optional<Slots> slots;
  bool distinct;
};

template <class Item>
void look_up(const Request& r, const Item* begin, const Item* end, std::vector<int64_t>& found) {
  const size_t before = found.size();
  Ngrams ngrams(r.shortest, r.longest);
  const auto each = [&](const auto& use) {
    each_word(begin, end, [&](uint64_t word) { ngrams.add(word, use); });
  };
  if (r.slots) {
    Finder finder(*r.slots, found);
    each([&](uint64_t hash) { finder.add(hash); });
    finder.finish();
  } else if (r.buckets) {
    each([&](uint64_t hash) { found.push_back(int64_t(hash % uint64_t(r.buckets))); });
  } else {
    each([&](uint64_t hash) { found.push_back(int64_t(hash)); });
  }
  if (r.distinct) {
    std::sort(found.begin() + before, found.end());
    found.erase(std::unique(found.begin() + before, found.end()), found.end());
  }
}

}  // namespace

Tensor ngram_slots(const Tensor& hashes) {
  STD_TORCH_CHECK(hashes.dim() == 1 && hashes.scalar_type() == ScalarType::Long,
                  "ngram_slots: hashes must be int64 [V]");
  const Tensor from = as_contiguous(hashes);
  const auto* data = static_cast<const uint64_t*>(from.const_data_ptr());
  int64_t capacity = 8;
  while (capacity < 2 * hashes.size(0)) capacity *= 2;
  Tensor result = torch::stable::new_empty(hashes, {capacity, 2});
  Slot* slots = static_cast<Slot*>(result.mutable_data_ptr());
  std::fill(slots, slots + capacity, Slot{0, -1});
  const Slots made{slots, uint64_t(capacity - 1)};
  for (int64_t i = 0; i < hashes.size(0); ++i) {
    if (i + kAhead < hashes.size(0)) made.fetch(data[i + kAhead]);
    uint64_t at = data[i] & made.mask;
    while (slots[at].number >= 0 && slots[at].hash != data[i]) at = (at + 1) & made.mask;
    STD_TORCH_CHECK(slots[at].number < 0, "ngram_slots: hashes must not repeat, but ",
                    int64_t(data[i]), " does");
    slots[at] = {data[i], i};
  }
  return result;
}

std::tuple<Tensor, Tensor> ngram_lookup(const Tensor& text, const Tensor& offsets,
                                        std::optional<Tensor> slots, int64_t buckets,
                                        int64_t shortest, int64_t longest, bool distinct) {
  const bool bytes = text.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(text.dim() == 1 && (bytes || text.scalar_type() == ScalarType::Long), kOp,
                  ": text must be uint8 bytes or int64 tokens, of one dimension");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 &&
                      offsets.scalar_type() == ScalarType::Long,
                  kOp, ": offsets must be int64 [B + 1]");
  STD_TORCH_CHECK(1 <= shortest && shortest <= longest && longest <= kMaxN, kOp,
                  ": n must rise within [1, ", kMaxN, "], got ", shortest, " to ", longest);
  STD_TORCH_CHECK(buckets >= 0, kOp, ": buckets must not be negative, got ", buckets);
  const Tensor items = as_contiguous(text), bounds = as_contiguous(offsets);
  const auto* at = static_cast<const int64_t*>(bounds.const_data_ptr());
  const int64_t count = text.size(0), texts = offsets.size(0) - 1;
  bool rises = at[0] == 0 && at[texts] == count;
  for (int64_t b = 0; b < texts; ++b) rises &= at[b] <= at[b + 1];
  STD_TORCH_CHECK(rises, kOp, ": offsets must rise from 0 to the length of text, ", count);
  Request request{shortest, longest, buckets, std::nullopt, distinct};
  if (slots) {
    const int64_t capacity = slots->dim() == 2 ? slots->size(0) : 0;
    STD_TORCH_CHECK(capacity > 0 && slots->size(1) == 2 && (capacity & (capacity - 1)) == 0 &&
                        slots->scalar_type() == ScalarType::Long && slots->is_contiguous(),
                    kOp, ": slots must be what ngram_slots makes");
    request.slots = Slots{static_cast<const Slot*>(slots->const_data_ptr()),
                          uint64_t(capacity - 1)};
  }

  struct Task {
    int64_t first, last;
    std::vector<int64_t> found;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0, from = 0; b < texts; ++b)
    if (b + 1 == texts || at[b + 1] - at[from] >= kTaskItems) {
      tasks.push_back({from, b + 1, {}});
      from = b + 1;
    }
  Tensor counts = torch::stable::new_empty(offsets, {texts + 1});
  auto* ends = static_cast<int64_t*>(counts.mutable_data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  run_tasks(tasks.size(), threads, [&](int64_t t) {
    Task& task = tasks[t];
    for (int64_t b = task.first; b < task.last; ++b) {
      if (bytes) {
        const auto* data = static_cast<const uint8_t*>(items.const_data_ptr());
        look_up(request, data + at[b], data + at[b + 1], task.found);
      } else {
        const auto* data = static_cast<const int64_t*>(items.const_data_ptr());
        look_up(request, data + at[b], data + at[b + 1], task.found);
      }
      ends[b + 1] = int64_t(task.found.size());
    }
  });
  int64_t total = 0;
  ends[0] = 0;
  for (const Task& task : tasks) {
    for (int64_t b = task.first; b < task.last; ++b) ends[b + 1] += total;
    total += int64_t(task.found.size());
  }
  Tensor ids = torch::stable::new_empty(offsets, {total});
  if (total) {
    auto* out = static_cast<int64_t*>(ids.mutable_data_ptr());
    run_tasks(tasks.size(), total < kTaskItems ? 1 : threads, [&](int64_t t) {
      const std::vector<int64_t>& found = tasks[t].found;
      if (!found.empty())
        std::memcpy(out + ends[tasks[t].first], found.data(), found.size() * sizeof(int64_t));
    });
  }
  return {ids, counts};
}

}  // namespace lean_kernels

// Numbers the distinct ids of one row in the order in which they are met.
//
// An open-addressed table of twice the row's ids: constant time per id however many repeat,
// and no allocation from row to row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace megatron_pd {

class SlotMap {
 public:
  explicit SlotMap(int64_t most_ids) : entries_(table_size(most_ids), Entry{kEmpty, 0}) {
    shift_ = 64 - __builtin_ctzll(entries_.size());
  }

  void clear() {
    std::fill(entries_.begin(), entries_.end(), Entry{kEmpty, 0});
    size_ = 0;
  }

  int64_t size() const { return size_; }

  // The column's number, and whether it was met for the first time.
  std::pair<int64_t, bool> find_or_add(int64_t column) {
    uint64_t at =
        (static_cast<uint64_t>(column) * 0x9e3779b97f4a7c15u) >> shift_;  // Fibonacci hashing
    while (entries_[at].column != kEmpty) {
      if (entries_[at].column == column) return {entries_[at].slot, false};
      at = (at + 1) & (entries_.size() - 1);
    }
    entries_[at] = {column, size_};
    return {size_++, true};
  }

 private:
  static constexpr int64_t kEmpty = -1;
  struct Entry {
    int64_t column, slot;
  };

  static size_t table_size(int64_t most_ids) {
    size_t size = 2;
    while (size < 2 * static_cast<size_t>(most_ids)) size *= 2;
    return size;
  }

  std::vector<Entry> entries_;
  int shift_;
  int64_t size_ = 0;
};

}  // namespace megatron_pd

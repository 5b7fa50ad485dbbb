// The vocabulary in the order in which its ids are expected: an id becomes its ordinal.
//
// A row's first id says much about the others: after a likely verb come other verbs.  So first ids
// are divided into classes, and a row's other ids have the ordinals of its class: how many ids come
// more often in such rows.  Classes differ in the commonest ids; behind those, ordinals are the
// same for all, as they are for the first ids of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bits.h"
#include "rows.h"

namespace logit_codec {

class VocabularyOrder {
 public:
  // A class takes about two percent of the bytes of so many entries.
  static constexpr size_t kEntriesPerClass = 1 << 16;

  // id_counts: how often each id was seen so far; sample: rows to find classes in.
  static VocabularyOrder train(std::span<const uint64_t> id_counts, const Rows& sample,
                               size_t entries_per_class = kEntriesPerClass);

  // Throws Corrupt unless every id has one ordinal, in every class.
  VocabularyOrder(BitReader& in, uint32_t vocab_size, uint32_t seen);
  void put(BitWriter& out) const;

  // Ids with ordinals from here on were not seen when the order was made.
  uint32_t seen() const { return seen_; }
  uint32_t vocab_size() const { return uint32_t(ids_.size()); }
  uint32_t first_id(uint32_t ordinal) const { return ids_[ordinal]; }

  // The class of a row whose first id has this ordinal.
  uint32_t class_of(uint32_t ordinal) const { return class_of_[std::min(ordinal, common_)]; }
  uint32_t id(uint32_t of_class, uint32_t ordinal) const {
    return ordinal < common_ ? class_ids_[of_class * common_ + ordinal] : ids_[ordinal];
  }

  size_t bytes() const { return 4 * (ids_.size() + class_ids_.size()); }

 private:
  friend class OrdinalOfId;
  VocabularyOrder() = default;
  void make_classes(std::span<const uint32_t> ordinal_of_id, const Rows& sample, uint32_t classes);

  uint32_t seen_ = 0;
  std::vector<uint32_t> ids_;         // by ordinal
  uint32_t classes_ = 0;              // 0: all rows are alike
  uint32_t common_ = 0;               // how many ordinals depend on the class; 0 without classes
  std::vector<uint8_t> class_of_{0};  // of the first ids of these ordinals, then of all others
  std::vector<uint32_t> class_ids_;   // by class and ordinal
};

// The inverse, for encoders.
class OrdinalOfId {
 public:
  explicit OrdinalOfId(const VocabularyOrder& order);

  // The ordinal of a first id, and what becomes of it in a class.
  uint32_t first(uint32_t id) const { return ordinal_[id]; }
  uint32_t in_class(uint32_t of_class, uint32_t ordinal) const {
    return ordinal < common_ ? class_ordinal_[of_class * common_ + ordinal] : ordinal;
  }

 private:
  uint32_t common_;
  std::vector<uint32_t> ordinal_;
  std::vector<uint32_t> class_ordinal_;  // by class and ordinal among all rows
};

}  // namespace logit_codec

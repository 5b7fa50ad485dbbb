#include "compact/vocabulary_order.h"

#include <numeric>

#include "compact/buckets.h"
#include "compact/co_occurrence.h"

namespace logit_codec {
namespace {

constexpr uint32_t kMaxClasses = 32, kMaxCommon = 2048;

// Ordinals are cut where the buckets of numbers are: inside one, all are equally likely and so may
// be listed by number.  Calls visit(first ordinal, last ordinal + 1).
template <class Visit>
void for_each_bucket(uint32_t ordinals, Visit&& visit) {
  for (uint32_t first = 0, symbol = 0; first < ordinals; ++symbol) {
    const uint32_t end = symbol + 1 < kSymbols ? bucket_named(symbol + 1).first : ordinals;
    visit(first, std::min(end, ordinals));
    first = end;
  }
}

// The first `listed` of `numbers` by falling count, those of a bucket by number.
template <class Count>
std::vector<uint32_t> by_count(std::span<const Count> counts, uint32_t listed) {
  std::vector<uint32_t> numbers(counts.size());
  std::iota(numbers.begin(), numbers.end(), 0u);
  std::stable_sort(numbers.begin(), numbers.end(),
                   [&](uint32_t a, uint32_t b) { return counts[a] > counts[b]; });
  for_each_bucket(listed, [&](uint32_t first, uint32_t end) {
    std::sort(numbers.begin() + first, numbers.begin() + end);
  });
  return numbers;
}

// Bits of the low part of the gaps between n of so many numbers (a Rice code).
int gap_bits(uint32_t numbers, uint32_t n) {
  const uint64_t mean = (uint64_t(numbers) * 177 / 256) / n;
  return mean ? log2_floor(uint32_t(mean)) : 0;
}

// A list that by_count made: its first `listed` numbers, of all below `numbers`.
void put_list(BitWriter& out, const uint32_t* list, uint32_t listed, uint32_t numbers) {
  for_each_bucket(listed, [&](uint32_t first, uint32_t end) {
    const int low = gap_bits(numbers, end - first);
    uint32_t next = 0;
    for (uint32_t ordinal = first; ordinal < end; ++ordinal) {
      const uint32_t gap = list[ordinal] - next;
      out.put_unary(gap >> low);
      out.put(gap & ((1u << low) - 1), low);
      next = list[ordinal] + 1;
    }
  });
}

// Fills list[0, listed); returns which numbers are in it.
std::vector<bool> get_list(BitReader& in, uint32_t* list, uint32_t listed, uint32_t numbers) {
  std::vector<bool> taken(numbers);
  for_each_bucket(listed, [&](uint32_t first, uint32_t end) {
    const int low = gap_bits(numbers, end - first);
    uint32_t next = 0;
    for (uint32_t ordinal = first; ordinal < end; ++ordinal) {
      const uint32_t high = in.get_unary(numbers >> low);
      const uint64_t number = next + (uint64_t(high) << low) + in.get(low);
      if (number >= numbers)
        refuse("the vocabulary order lists number ", number, " of ", numbers, " before bit ",
               in.position());
      if (taken[number])
        refuse("the vocabulary order lists number ", number, " twice, before bit ", in.position());
      taken[number] = true;
      list[ordinal] = uint32_t(number);
      next = uint32_t(number) + 1;
    }
  });
  return taken;
}

std::vector<uint32_t> inverse(std::span<const uint32_t> list) {
  std::vector<uint32_t> indices(list.size());
  for (uint32_t index = 0; index < list.size(); ++index) indices[list[index]] = index;
  return indices;
}

// The ordinals below `common` that came in rows with others, by the ordinal of the rows' first ids;
// all rare first ids are taken for one.
CoOccurrences co_occurrences_of(std::span<const uint32_t> ordinal_of_id, const Rows& rows,
                                uint32_t common) {
  CoOccurrences pairs{std::vector<uint32_t>(common + 2), {}, common};
  const auto for_each_pair = [&](auto&& visit) {
    size_t entry = 0;
    for (const int32_t count : rows.counts) {
      const std::span<const int32_t> ids = rows.ids.subspan(entry, size_t(count));
      entry += ids.size();
      for (size_t i = 1; i < ids.size(); ++i) {
        const uint32_t other = ordinal_of_id[size_t(ids[i])];
        if (other < common) visit(std::min(ordinal_of_id[size_t(ids[0])], common), other);
      }
    }
  };
  for_each_pair([&](uint32_t first, uint32_t) { ++pairs.begin[first + 1]; });
  std::partial_sum(pairs.begin.begin(), pairs.begin.end(), pairs.begin.begin());
  pairs.others.resize(pairs.begin.back());
  std::vector<uint32_t> next = pairs.begin;
  for_each_pair([&](uint32_t first, uint32_t other) { pairs.others[next[first]++] = other; });
  return pairs;
}

}  // namespace

VocabularyOrder VocabularyOrder::train(std::span<const uint64_t> id_counts, const Rows& sample,
                                       size_t entries_per_class) {
  VocabularyOrder order;
  order.seen_ = uint32_t(id_counts.size() - std::count(id_counts.begin(), id_counts.end(), 0u));
  order.ids_ = by_count(id_counts, order.seen_);
  const size_t classes = std::min<size_t>(sample.ids.size() / entries_per_class, kMaxClasses);
  if (classes > 1) order.make_classes(inverse(order.ids_), sample, uint32_t(classes));
  return order;
}

void VocabularyOrder::make_classes(std::span<const uint32_t> ordinal_of_id, const Rows& sample,
                                   uint32_t classes) {
  classes_ = classes;
  common_ = std::min(seen_, kMaxCommon);
  const Classes found = find_classes(co_occurrences_of(ordinal_of_id, sample, common_), classes_);
  class_of_ = found.of_first;
  for (uint32_t c = 0; c < classes_; ++c) {
    const std::span<const uint32_t> counts(found.counts.data() + size_t(c) * common_, common_);
    for (const uint32_t ordinal : by_count(counts, common_)) class_ids_.push_back(ids_[ordinal]);
  }
}

void VocabularyOrder::put(BitWriter& out) const {
  put_list(out, ids_.data(), seen_, vocab_size());
  out.put(classes_, 8);
  if (classes_ == 0) return;
  for (const uint8_t of_first : class_of_) out.put(of_first, bit_width(classes_ - 1));
  const std::vector<uint32_t> ordinal_of_id = inverse(ids_);
  std::vector<uint32_t> ordinals(common_);
  for (uint32_t c = 0; c < classes_; ++c) {
    for (uint32_t i = 0; i < common_; ++i) ordinals[i] = ordinal_of_id[class_ids_[c * common_ + i]];
    put_list(out, ordinals.data(), common_, common_);
  }
}

VocabularyOrder::VocabularyOrder(BitReader& in, uint32_t vocab_size, uint32_t seen)
    : seen_(seen), ids_(vocab_size) {
  const std::vector<bool> taken = get_list(in, ids_.data(), seen, vocab_size);
  for (uint32_t id = 0, ordinal = seen; id < vocab_size; ++id)
    if (!taken[id]) ids_[ordinal++] = id;
  classes_ = in.get(8);
  if (classes_ == 0) return;
  common_ = std::min(seen, kMaxCommon);
  class_of_.resize(common_ + 1);
  for (uint8_t& of_first : class_of_) {
    of_first = uint8_t(in.get(bit_width(classes_ - 1)));
    if (of_first >= classes_)
      refuse("rows are given to class ", int(of_first), " before bit ", in.position(),
             "; there are ", classes_, " classes");
  }
  class_ids_.resize(size_t(classes_) * common_);
  for (uint32_t c = 0; c < classes_; ++c) {
    uint32_t* ids = class_ids_.data() + size_t(c) * common_;
    get_list(in, ids, common_, common_);
    std::transform(ids, ids + common_, ids, [&](uint32_t ordinal) { return ids_[ordinal]; });
  }
}

OrdinalOfId::OrdinalOfId(const VocabularyOrder& order)
    : common_(order.common_), ordinal_(inverse(order.ids_)) {
  for (uint32_t c = 0; c < order.classes_; ++c) {
    std::vector<uint32_t> indices(common_);
    for (uint32_t index = 0; index < common_; ++index)
      indices[ordinal_[order.class_ids_[c * common_ + index]]] = index;
    class_ordinal_.insert(class_ordinal_.end(), indices.begin(), indices.end());
  }
}

}  // namespace logit_codec

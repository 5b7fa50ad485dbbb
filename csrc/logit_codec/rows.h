// Rows of a block before they are coded, and after.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace logit_codec {

inline constexpr uint32_t kMaxVocabSizeLog2 = 24, kMaxEntriesOfARow = 0xFFFF;

// What a shard's header says about its rows.
struct Layout {
  uint32_t vocab_size;
  uint32_t draws;  // 0: top rows
  int value_bits;
};

// Rows without padding: counts of each row, ids and log-probabilities of each entry.
struct Rows {
  std::span<const int32_t> counts;
  std::span<const int32_t> ids;
  std::span<const float> logprobs;
};

// Where a block's rows are decoded to.
struct RowBuffers {
  std::vector<int32_t> counts, ids;
  std::vector<float> logprobs;
};

// Of a sampled row: how often an entry was drawn.
inline uint32_t draws_of(const Layout& layout, float logprob) {
  return uint32_t(std::lround(std::exp(double(logprob)) * layout.draws));
}

// Throws BadRows where a row is not what a store holds: ids in the vocabulary and different from
// each other, log-probabilities finite, at most 0 and falling, draws that sum up.
void check_rows(const Layout& layout, const Rows& rows);

}  // namespace logit_codec

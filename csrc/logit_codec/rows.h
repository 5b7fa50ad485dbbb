// Rows before and after they are numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "span.h"

namespace logit_codec {

// What a shard's header says about its rows.
struct Layout {
    uint32_t vocab_size;
    uint32_t draws;  // 0: top rows
    int value_bits;
};

// Rows without padding.
struct Rows {
    Span<const int32_t> counts;
    Span<const int32_t> ids;
    Span<const float> logprobs;
};

// Rows as the numbers that are entropy-coded: ranks instead of ids, and codes of the grid (top
// rows) or draws (sampled rows) instead of log-probabilities.
struct CodedRows {
    std::vector<uint32_t> counts, tails;  // of each row; sampled rows and empty ones have no tail
    std::vector<uint32_t> ranks, codes;   // of each entry
};

inline constexpr uint32_t kMostEntriesOfARow = 0xFFFF;

}  // namespace logit_codec

// Contexts: which model of the entropy model a number is coded with.
#pragma once

#include <algorithm>

#include "compact/buckets.h"
#include "compact/quantizer.h"

namespace logit_codec {

// Octaves of an entry's position in its row.
inline constexpr int kPlaces = 6;

inline constexpr int kCountContexts = 8, kFirstValueContexts = 8;

inline constexpr int kFirstIdContext = 0;
inline constexpr int kNewIdContext = 1;
inline constexpr int kTiedIdContext = kNewIdContext + kPlaces;
inline constexpr int kCountContext = kTiedIdContext + kMaxNumberLog2 + 1;
inline constexpr int kFirstValueContext = kCountContext + kCountContexts;
inline constexpr int kTailContext = kFirstValueContext + kFirstValueContexts;
inline constexpr int kNextValueContext = kTailContext + kValueKinds;
inline constexpr int kContexts = kNextValueContext + kPlaces * kValueKinds;
inline constexpr int kIdContexts = kCountContext;

// Of the position of an entry that isn't its row's first.
inline int place_of(uint32_t position) { return std::min(log2_floor(position), kPlaces - 1); }

// The first position of the next place in a row of so many entries.
inline uint32_t end_of_place(int place, uint32_t count) {
  return place == kPlaces - 1 ? count : std::min(count, 2u << place);
}

inline int new_id_context(int place) { return kNewIdContext + place; }

inline int tied_id_context(uint32_t ordinal_before) {
  return kTiedIdContext + bit_width(ordinal_before);
}

inline int count_context(uint32_t count_before) {
  return kCountContext + std::min(bit_width(count_before), kCountContexts - 1);
}

inline int first_value_context(uint32_t count) {
  return kFirstValueContext + std::min(bit_width(count), kFirstValueContexts - 1);
}

inline int tail_context(int kind_of_guess) { return kTailContext + kind_of_guess; }

// A kind is one of a code, or of a number of draws.
inline int next_value_context(int place, int kind_before) {
  return kNextValueContext + place * kValueKinds + kind_before;
}

inline int draws_kind(uint32_t draws) { return int(std::min<uint32_t>(draws, kValueKinds - 1)); }

}  // namespace logit_codec

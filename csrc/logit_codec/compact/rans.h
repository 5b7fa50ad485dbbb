// Range asymmetric numeral systems with static models: 32-bit states, 16-bit words.
//
// A block uses two states over one stream of words, so that the two dependency chains of an entry
// (its id and its value) run side by side in the processor.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "bits.h"

namespace logit_codec {

inline constexpr uint32_t kFrequencyBits = 11, kTotal = 1u << kFrequencyBits;
inline constexpr uint32_t kLowest = 1u << 16;  // states lie in [2^16, 2^32)
inline constexpr uint32_t kEscape = 255;       // a symbol that a context lacks: 8 raw bits follow
inline constexpr double kRare = 4 * kTotal;  // a context lacks what comes less than once in so many

// Frequencies of symbols in a context, summing to kTotal.  The escape always has one.
struct ContextModel {
  std::array<uint16_t, 256> frequency{};
  std::array<uint16_t, 256> start{};

  static ContextModel fit(const std::array<double, 256>& counts);
  void place();
  bool has(uint32_t symbol) const { return frequency[symbol] != 0; }
};

// Rounds counts to frequencies of at least 1 by giving the largest what rounding leaves.  Rare
// symbols are left to the escape, which is cheaper than a whole slot for each.
inline ContextModel ContextModel::fit(const std::array<double, 256>& counts) {
  ContextModel model;
  std::array<double, 256> wanted = counts;
  wanted[kEscape] += 1;
  const double total = std::accumulate(wanted.begin(), wanted.end(), 0.0);
  for (uint32_t s = 0; s < kEscape; ++s) {
    if (wanted[s] >= total / kRare) continue;
    wanted[kEscape] += wanted[s];
    wanted[s] = 0;
  }
  int left = kTotal;
  for (int s = 0; s < 256; ++s) {
    if (wanted[s] <= 0) continue;
    const double share = wanted[s] / total * kTotal;
    model.frequency[s] = uint16_t(std::max(1.0, share + 0.5));
    left -= model.frequency[s];
  }
  while (left != 0) {
    auto& largest = *std::max_element(model.frequency.begin(), model.frequency.end());
    const int change = std::max(left, 1 - int(largest) / 2);
    largest = uint16_t(largest + change);
    left -= change;
  }
  model.place();
  return model;
}

inline void ContextModel::place() {
  uint32_t sum = 0;
  for (int s = 0; s < 256; ++s) {
    start[s] = uint16_t(sum);
    sum += frequency[s];
  }
  if (sum != kTotal) refuse("a context's frequencies sum to ", sum, ", not to ", kTotal);
}

// The same as a decoder wants it; small, so that the models of the commonest contexts stay near.
struct DecodingModel {
  std::array<uint8_t, kTotal> symbol;             // of each slot
  std::array<uint32_t, 256> start_and_frequency;  // of each symbol, in the low and the high half

  explicit DecodingModel(const ContextModel& model) {
    uint8_t* slot = symbol.data();
    for (uint32_t s = 0; s < 256; ++s) {
      slot = std::fill_n(slot, model.frequency[s], uint8_t(s));
      start_and_frequency[s] = model.start[s] | uint32_t(model.frequency[s]) << 16;
    }
  }
};

// Symbols must be put in the reverse of the order in which they are read.
class Encoder {
 public:
  void put(int state, const ContextModel& model, uint32_t symbol) {
    const uint32_t frequency = model.frequency[symbol];
    uint32_t& x = states_[state];
    if (x >= (uint64_t(frequency) << (32 - kFrequencyBits))) {
      words_.push_back(uint16_t(x));
      x >>= 16;
    }
    x = ((x / frequency) << kFrequencyBits) + x % frequency + model.start[symbol];
  }

  // The two states, then the words in the order of reading.
  void finish(std::vector<uint8_t>& out) {
    for (uint32_t state : states_) store(out, state);
    std::reverse(words_.begin(), words_.end());
    for (uint16_t word : words_) store(out, word);
  }

 private:
  std::array<uint32_t, 2> states_{kLowest, kLowest};
  std::vector<uint16_t> words_;
};

// Past the end of its words a Decoder reads zeros; `finish` then throws.  Whether a state takes a
// word is as good as random, so it is computed with: compilers make a branch of a mere choice.
class Decoder {
 public:
  explicit Decoder(Bytes bytes)
      : words_(part(bytes, 8, bytes.size() < 8 ? 0 : bytes.size() - 8)),
        states_{load<uint32_t>(bytes, 0), load<uint32_t>(bytes, 4)} {}

  template <int state>
  uint32_t get(const DecodingModel& model) {
    uint32_t& x = states_[state];
    const uint32_t slot = x & (kTotal - 1), symbol = model.symbol[slot];
    const uint32_t place = model.start_and_frequency[symbol];
    x = (place >> 16) * (x >> kFrequencyBits) + slot - (place & 0xFFFF);
    const uint32_t more = uint32_t(x < kLowest) * 16;
    x = (x << more) | (words_.peek<uint16_t>(next_) & ((1u << more) - 1));
    next_ += more / 8;
    return symbol;
  }

  void finish() const {
    if (next_ != words_.size())
      refuse("its rows end at byte ", next_, " of the entropy-coded words, and there are ",
             words_.size(), " bytes of them");
    if (states_[0] != kLowest || states_[1] != kLowest)
      refuse("its rows end with the states ", states_[0], " and ", states_[1],
             " of the entropy coder; both must be ", kLowest);
  }

 private:
  Padded words_;
  size_t next_ = 0;
  std::array<uint32_t, 2> states_;
};

}  // namespace logit_codec

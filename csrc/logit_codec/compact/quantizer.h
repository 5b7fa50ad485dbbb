// Probabilities as whole numbers.
//
// The code of a probability p is that of the nearest level, and levels are roots, sqrt(p).  In the
// root every entry costs the same: an error of e in it costs about 2 e^2 nats, however likely the
// entry is, so that even steps spend the fewest bits for a given divergence.  Below eight steps the
// levels lie closer with every octave, so that no probability is off by more than an eighth or so.
//
// The tail (the mass of no entry) has a code like an entry, and the decoded probabilities are the
// squares of all roots over their sum.  So decoded masses never exceed 1, and with w = root^2
//
//     KL = sum_i p_i log(p_i / w_i) + log(sum_i w_i) <= sum_i (p_i log(p_i / w_i) - p_i + w_i),
//
// whose terms are at most 0.52 step^2 each.  For rows of very many entries there is Hoeffding's
// lemma: as no two log(p_i / w_i) are further than 2 log(9/8) apart, KL <= log(9/8)^2 / 2 = 0.0069.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "compact/buckets.h"

namespace logit_codec {

inline constexpr int kMinValueBits = 8, kMaxValueBits = 14;

// Halves of the octaves of roots that the levels span.
inline constexpr int kValueKinds = 2 * 19;

class Quantizer {
 public:
  // The one of kMinValueBits <= bits <= kMaxValueBits, made once.
  static const Quantizer& of(int bits) {
    static const std::vector<Quantizer> quantizers = [] {
      std::vector<Quantizer> made;
      for (int b = kMinValueBits; b <= kMaxValueBits; ++b) made.push_back(Quantizer(b));
      return made;
    }();
    return quantizers[size_t(bits - kMinValueBits)];
  }

  // The code of probability 1, the largest.
  uint32_t max_code() const { return max_code_; }

  // Square of a code's root.  65,536 of them don't overflow.
  uint64_t weight(uint32_t code) const { return weight_[code]; }

  // The code of the tail that the weights of a row's entries suggest.
  uint32_t likely_tail(uint64_t weights) const {
    const uint64_t rest = weight_[max_code_] - std::min(weights, weight_[max_code_]);
    return code_below(uint32_t(std::sqrt(double(rest))));
  }

  // Codes of one row of falling log-probabilities; returns its tail's.
  uint32_t encode(std::span<const float> logprobs, uint32_t* codes) const {
    double tail = 1;
    for (size_t i = 0; i < logprobs.size(); ++i) {
      const double root = std::exp(0.5 * double(logprobs[i]));
      codes[i] = nearest(root);
      tail -= root * root;
    }
    return nearest(std::sqrt(std::max(tail, 0.0)));  // the teacher's own rounding may exceed 1
  }

  void decode(std::span<const uint32_t> codes, uint32_t tail, float* logprobs) const {
    uint64_t total = weight_[tail];
    for (const uint32_t code : codes) total += weight_[code];
    const double log_total = std::log(double(total));
    for (size_t i = 0; i < codes.size(); ++i)
      logprobs[i] = float(log_weight_[codes[i]] - log_total);
  }

  // Which half of which octave a code's root is in, below kValueKinds.
  int kind(uint32_t code) const {
    const uint32_t number = root(code);
    const int octave = log2_floor(number);
    return 2 * (octave - kLevelsLog2) + int(number >> (octave - 1) & 1);
  }

 private:
  explicit Quantizer(int bits)
      : fine_octaves_(23 - bits),
        max_code_((75u << (bits - 8)) + (uint32_t(fine_octaves_) - 1) * kLevels) {
    for (uint32_t code = 0; code <= max_code_; ++code) {
      weight_.push_back(uint64_t(root(code)) * root(code));
      log_weight_.push_back(2 * std::log(double(root(code))));
    }
  }

  // sqrt(p) in units of the finest step: kLevels levels in every octave, then all steps alike.
  uint32_t root(uint32_t code) const {
    const uint32_t octave = std::min(code / kLevels, uint32_t(fine_octaves_));
    return (kLevels + code - octave * kLevels) << octave;
  }

  // The largest code whose root is at most this one.
  uint32_t code_below(uint32_t root) const {
    if (root < kLevels) return 0;
    const int octave = std::min(log2_floor(root) - kLevelsLog2, fine_octaves_);
    return (root >> octave) - kLevels + uint32_t(octave) * kLevels;
  }

  uint32_t nearest(double share) const {
    const double place = std::min(share, 1.0) * root(max_code_);
    const uint32_t below = code_below(uint32_t(place));
    return below + (below < max_code_ && 2 * place > double(root(below)) + root(below + 1));
  }

  static constexpr int kLevelsLog2 = 3;
  static constexpr uint32_t kLevels = 1u << kLevelsLog2;

  int fine_octaves_;
  uint32_t max_code_;
  std::vector<uint64_t> weight_;
  std::vector<double> log_weight_;
};

}  // namespace logit_codec

// Whole numbers as a symbol of a small alphabet and some raw bits.
//
// Numbers below 64 are their own symbol.  Above, every octave is cut into eight equal buckets: the
// symbol names the bucket, the raw bits the place in it.
#pragma once

#include <cstdint>

#include "rows.h"

namespace logit_codec {

inline constexpr uint32_t kDirect = 64, kDirectLog2 = 6, kCutsLog2 = 3;
inline constexpr uint32_t kMaxNumberLog2 = kMaxVocabSizeLog2;
inline constexpr uint32_t kSymbols = kDirect + ((kMaxNumberLog2 - kDirectLog2) << kCutsLog2);

struct Bucket {
  uint8_t symbol;
  int bits;        // raw bits that follow
  uint32_t first;  // its smallest number
};

// Bits that a number below 2^31 needs: 0 for 0, 1 for 1, 2 for 2 and 3, ...
inline int bit_width(uint32_t number) { return 31 - __builtin_clz(2 * number + 1); }

inline int log2_floor(uint32_t number) { return bit_width(number) - 1; }

// A number near a guess as a small number, and back (to a huge one where it would be negative).
inline uint32_t zigzag(uint32_t number, uint32_t guess) {
  return number >= guess ? 2 * (number - guess) : 2 * (guess - number) - 1;
}

inline uint32_t unzigzag(uint32_t coded, uint32_t guess) {
  return coded & 1 ? guess - (coded / 2 + 1) : guess + coded / 2;
}

inline Bucket bucket_of(uint32_t number) {
  if (number < kDirect) return {uint8_t(number), 0, number};
  const int octave = log2_floor(number), bits = octave - int(kCutsLog2);
  const uint32_t cut = (number >> bits) - (1u << kCutsLog2);
  const uint32_t symbol = kDirect + ((octave - kDirectLog2) << kCutsLog2) + cut;
  return {uint8_t(symbol), bits, (number >> bits) << bits};
}

// symbol < kSymbols
inline Bucket bucket_named(uint32_t symbol) {
  if (symbol < kDirect) return {uint8_t(symbol), 0, symbol};
  const uint32_t place = symbol - kDirect, cuts = 1u << kCutsLog2;
  const int bits = int(place >> kCutsLog2) + int(kDirectLog2 - kCutsLog2);
  return {uint8_t(symbol), bits, (cuts + (place & (cuts - 1))) << bits};
}

}  // namespace logit_codec

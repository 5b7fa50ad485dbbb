// Streams of bits, from the least significant of each byte on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"

namespace logit_codec {

class BitWriter {
 public:
  void put(uint32_t value, int bits) {
    pending_ |= uint64_t(value) << used_;
    used_ += bits;
    for (; used_ >= 8; used_ -= 8, pending_ >>= 8) out_.push_back(uint8_t(pending_));
  }

  // As many zeros, and a one.
  void put_unary(uint32_t number) {
    for (; number >= 16; number -= 16) put(0, 16);
    put(1u << number, int(number) + 1);
  }

  // Elias's gamma code of a number that isn't 0.
  void put_gamma(uint32_t number) {
    const int bits = 31 - __builtin_clz(number);
    put_unary(uint32_t(bits));
    put(number & ((1u << bits) - 1), bits);
  }

  std::vector<uint8_t> finish() {
    if (used_ > 0) out_.push_back(uint8_t(pending_));
    return std::move(out_);
  }

 private:
  std::vector<uint8_t> out_;
  uint64_t pending_ = 0;
  int used_ = 0;
};

// Bytes with zeros behind them, so that a reader may look ahead without asking whether it may.
class Padded {
 public:
  explicit Padded(Bytes bytes) : bytes_(bytes.size() + 8), size_(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), bytes_.begin());
  }

  size_t size() const { return size_; }

  // What lies at a byte offset; zeros from the end on.
  template <class T>
  T peek(size_t offset) const {
    static_assert(sizeof(T) <= 8);
    T value;
    std::memcpy(&value, bytes_.data() + std::min(offset, size_), sizeof(T));
    return value;
  }

 private:
  std::vector<uint8_t> bytes_;
  size_t size_;
};

// Past its end a BitReader yields zeros; `finish` then throws.
class BitReader {
 public:
  explicit BitReader(Bytes bytes) : bytes_(bytes) {}

  // bits <= 32
  uint32_t get(int bits) {
    const uint64_t word = bytes_.peek<uint64_t>(position_ >> 3) >> (position_ & 7);
    position_ += size_t(bits);
    return uint32_t(word & ((uint64_t(1) << bits) - 1));
  }

  uint32_t get_unary(uint32_t most) {
    for (uint32_t number = 0; number <= most; ++number)
      if (get(1)) return number;
    refuse("unary code exceeds its maximum (", most, ") at bit ", position_ - most - 1);
  }

  uint32_t get_gamma() {
    const uint32_t bits = get_unary(24);
    return (1u << bits) | get(int(bits));
  }

  // How many bits were read.
  size_t position() const { return position_; }

  // All bytes must be used, and the bits that fill the last one be zero.
  void finish() const {
    const size_t used = (position_ + 7) >> 3;
    if (used != bytes_.size())
      refuse("the last bit is read at bit ", position_, ", in byte ", used, " of ", bytes_.size(),
             " bytes of bits");
    if ((position_ & 7) && bytes_.peek<uint8_t>(used - 1) >> (position_ & 7))
      refuse("behind bit ", position_, ", the last, its byte is not filled with zeros");
  }

 private:
  Padded bytes_;
  size_t position_ = 0;
};

}  // namespace logit_codec

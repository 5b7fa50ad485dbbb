// Little-endian bytes, CRC-32 and bit streams.  Nothing here reads past a span it was given.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "span.h"

namespace logit_codec {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is read in place");

using Bytes = Span<const uint8_t>;

// Bytes that are not what the format allows.
struct Corrupt : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Rows that the format cannot hold.
struct BadRows : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline Bytes part(Bytes bytes, uint64_t offset, uint64_t size) {
    if (offset > bytes.size() || size > bytes.size() - offset)
        throw Corrupt("needs " + std::to_string(size) + " bytes at " + std::to_string(offset) +
                      " of " + std::to_string(bytes.size()));
    return bytes.subspan(offset, size);
}

template <class T>
T load(Bytes bytes, uint64_t offset) {
    T value;
    std::memcpy(&value, part(bytes, offset, sizeof(T)).data(), sizeof(T));
    return value;
}

// Fills `out` from bytes at an offset.
template <class T>
void load_all(Bytes bytes, uint64_t offset, Span<T> out) {
    const Bytes source = part(bytes, offset, out.size_bytes());
    if (!out.empty()) std::memcpy(out.data(), source.data(), source.size());
}

template <class T>
void store(std::vector<uint8_t>& out, T value) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
    out.insert(out.end(), bytes, bytes + sizeof(T));
}

// CRC-32 as in zlib, eight bytes a step.
inline uint32_t crc32(Bytes bytes) {
    static const auto tables = [] {
        std::array<std::array<uint32_t, 256>, 8> t{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0xEDB88320u : 0);
            t[0][i] = c;
        }
        for (int k = 1; k < 8; ++k)
            for (uint32_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 255];
        return t;
    }();
    uint32_t crc = ~0u;
    size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
        uint64_t word;
        std::memcpy(&word, bytes.data() + i, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= tables[7 - k][(word >> (8 * k)) & 255];
    }
    for (; i < bytes.size(); ++i) crc = (crc >> 8) ^ tables[0][(crc ^ bytes[i]) & 255];
    return ~crc;
}

// Bits from the least significant of each byte on.
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
        throw Corrupt("a number that is too large where it stands");
    }

    uint32_t get_gamma() {
        const uint32_t bits = get_unary(24);
        return (1u << bits) | get(int(bits));
    }

    // All bytes must be used, and the bits that fill the last one be zero.
    void finish() const {
        const size_t used = (position_ + 7) >> 3;
        const bool filled = (position_ & 7) == 0 || bytes_.peek<uint8_t>(used - 1) >> (position_ & 7) == 0;
        if (used != bytes_.size() || !filled)
            throw Corrupt("the raw bits do not end where the rows end");
    }

   private:
    Padded bytes_;
    size_t position_ = 0;
};

}  // namespace logit_codec

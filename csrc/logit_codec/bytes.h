// Little-endian bytes and CRC-32.  Nothing here reads past a span it was given.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace logit_codec {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is read in place");

using Bytes = std::span<const uint8_t>;

// Bytes that are not what the format allows.
struct Corrupt : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows that the format cannot hold.
struct BadRows : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Corrupt (or BadRows) with its arguments as one text.  By value, so that the loops that
// call it may keep their variables in registers.
template <class Error = Corrupt, class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(Parts... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

inline Bytes part(Bytes bytes, uint64_t offset, uint64_t size) {
  if (offset > bytes.size() || size > bytes.size() - offset)
    refuse(size, " bytes are needed from byte ", offset, " on, and there are ", bytes.size(),
           " bytes in all");
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
void load_all(Bytes bytes, uint64_t offset, std::span<T> out) {
  const Bytes source = part(bytes, offset, out.size_bytes());
  if (!out.empty()) std::memcpy(out.data(), source.data(), source.size());
}

template <class T>
void store(std::vector<uint8_t>& out, T value) {
  const size_t end = out.size();
  out.resize(end + sizeof(T));
  std::memcpy(out.data() + end, &value, sizeof(T));
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

}  // namespace logit_codec

// The frames of a shard, between its header and its index: entropy models and blocks of rows.
#pragma once

#include <cstdint>

#include "bytes.h"

namespace logit_codec {

inline constexpr uint32_t kShardHeaderBytes = 64;
inline constexpr int kStatistics = 3;  // label_logprob, entropy, std

// The 48 bytes before an entropy model or a block.
struct FrameHeader {
  uint32_t magic;
  uint8_t type, codec, statistics, zero;
  uint32_t rows, payload_bytes;
  uint64_t row, model_offset;
  uint32_t entries;
  uint16_t max_count, digests;
  uint32_t payload_crc, crc;
};
static_assert(sizeof(FrameHeader) == 48);

inline constexpr uint32_t kFrameMagic = 0x4B424450;  // "PDBK"
inline constexpr uint8_t kModelFrame = 1, kRowsFrame = 2;

struct Frame {
  uint64_t offset;
  FrameHeader header;
  Bytes payload;

  uint64_t end() const { return offset + sizeof(FrameHeader) + header.payload_bytes; }
};

// Every function throws Corrupt where a checksum does not fit.
class Frames {
 public:
  // end: where the index begins.
  Frames(Bytes file, uint64_t end) : file_(file), end_(end) {}

  uint64_t end() const { return end_; }
  FrameHeader header(uint64_t offset) const;
  Frame frame(uint64_t offset) const;

  // The payload of the entropy model that a block references.
  Bytes model(const FrameHeader& block) const;

 private:
  Bytes file_;
  uint64_t end_;
};

}  // namespace logit_codec

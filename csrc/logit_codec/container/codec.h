// What a shard asks of a codec.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "bytes.h"
#include "container/frames.h"
#include "rows.h"

namespace logit_codec {

// A block as its codec gets it: header and payload are intact.
struct Block {
  uint64_t offset;
  FrameHeader header;
  Bytes stream;  // the payload behind digests and statistics
};

// Decodes the blocks of one shard, in any number of threads.
class Codec {
 public:
  virtual ~Codec() = default;

  // Of the value of a statistic in its blocks: 4 (float32) or 2 (float16).
  virtual size_t statistic_bytes() const = 0;

  // The rows of a block, at least its first `wanted`; all ids are in the vocabulary.  Throws
  // Corrupt where the stream does not hold them.
  virtual RowBuffers decode(const Frames& frames, const Block& block, size_t wanted) const = 0;
};

inline constexpr uint8_t kExact = 0, kCompact = 1;

// By the number that a block's header names.
using Codecs = std::map<uint8_t, std::unique_ptr<const Codec>>;

}  // namespace logit_codec

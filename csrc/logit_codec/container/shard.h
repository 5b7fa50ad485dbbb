// A finished shard in memory: finds and decodes the blocks of a range of rows.
//
// Every byte is checked before it is used: index pages, block headers, payloads and entropy models
// carry CRC-32s, and whatever passes them is still bounds-checked.  Any number of threads may read.
#pragma once

#include "container/codec.h"
#include "container/frames.h"
#include "container/index.h"

namespace logit_codec {

// Padded output: ids and logprobs [rows, width], counts [rows].  Rows with more than `width`
// entries keep the top ones.  statistics: three pointers to [rows], all or none.
struct Output {
  int32_t* ids;
  float* logprobs;
  int32_t* counts;
  uint32_t width;
  float* const* statistics = nullptr;
};

class Shard {
 public:
  Shard(Bytes file, const Geometry& geometry, Codecs codecs);

  const Index& index() const { return index_; }
  const Frames& frames() const { return frames_; }

  // The most entries that a row in blocks of [begin, end) has.
  uint32_t max_count(uint64_t begin, uint64_t end) const;
  void read(uint64_t begin, uint64_t end, const Output& out) const;

  // The frame of a block, which has the rows that the index says.
  Frame block(uint64_t number) const;

  // Throws Corrupt unless a block is intact, decodes, and ends where the next begins.
  void check_block(uint64_t number) const;
  // Throws Corrupt unless intact frames fill the file from its header to its index: also those
  // that no read comes by, such as entropy models that a crash left unused.
  void check_frames() const;

 private:
  struct DecodedBlock;

  FrameHeader block_header(uint64_t number) const;
  const Codec& codec_of(const Frame& frame) const;
  DecodedBlock decode(uint64_t number, size_t wanted) const;
  void check_range(uint64_t begin, uint64_t end) const;

  Index index_;
  Frames frames_;
  Codecs codecs_;
};

}  // namespace logit_codec

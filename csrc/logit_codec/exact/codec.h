// Codec `exact`: entries of every row, ids of three bytes, float32 log-probabilities.
#pragma once

#include <cstdint>
#include <vector>

#include "bytes.h"
#include "container/codec.h"
#include "rows.h"

namespace logit_codec {

std::vector<uint8_t> encode_exact(const Rows& rows);

// The `rows` rows of a stream, which have so many entries in all.
RowBuffers decode_exact(const Layout& layout, Bytes stream, size_t rows, size_t entries);

class ExactCodec final : public Codec {
 public:
  explicit ExactCodec(const Layout& layout) : layout_(layout) {}

  size_t statistic_bytes() const override { return sizeof(float); }
  RowBuffers decode(const Frames&, const Block& block, size_t) const override {
    return decode_exact(layout_, block.stream, block.header.rows, block.header.entries);
  }

 private:
  Layout layout_;
};

}  // namespace logit_codec

// Codec `compact`: blocks as symbol streams, coded with an entropy model.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bytes.h"
#include "compact/entropy_model.h"
#include "container/codec.h"
#include "rows.h"

namespace logit_codec {

// ordinal_of_id: of the model's vocabulary order.
std::vector<uint8_t> encode_compact(const EntropyModel& model, const OrdinalOfId& ordinal_of_id,
                                    const Rows& rows);

// The first `wanted` of a stream's rows, which have so many entries in all.  Only a whole stream is
// checked to end where its rows do.
RowBuffers decode_compact(const EntropyModel& model, Bytes stream, size_t rows, size_t entries,
                          size_t wanted);

// The stream of `row_count` of the rows of a stream, bit-exact in what it decodes to.
std::vector<uint8_t> slice_compact(const EntropyModel& model, Bytes stream, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count);

// Of one shard, whose entropy models it keeps parsed for a while.
class CompactCodec final : public Codec {
 public:
  explicit CompactCodec(const Layout& layout);

  size_t statistic_bytes() const override { return sizeof(uint16_t); }
  RowBuffers decode(const Frames& frames, const Block& block, size_t wanted) const override;

 private:
  std::shared_ptr<const EntropyModel> model_of(const Frames& frames, const Block& block) const;

  Layout layout_;
  uint64_t shard_;  // a number of its own
};

}  // namespace logit_codec

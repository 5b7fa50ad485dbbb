#include "compact/codec.h"

#include <atomic>

#include "compact/coded_rows.h"
#include "compact/model_cache.h"
#include "compact/symbol_stream.h"

namespace logit_codec {

std::vector<uint8_t> encode_compact(const EntropyModel& model, const OrdinalOfId& ordinal_of_id,
                                    const Rows& rows) {
  return write_symbol_stream(
      model, code_rows(model.layout(), model.quantizer(), model.order(), ordinal_of_id, rows));
}

RowBuffers decode_compact(const EntropyModel& model, Bytes stream, size_t rows, size_t entries,
                          size_t wanted) {
  return decode_rows(model.layout(), model.quantizer(), model.order(),
                     read_symbol_stream(model, stream, rows, entries, wanted));
}

std::vector<uint8_t> slice_compact(const EntropyModel& model, Bytes stream, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count) {
  CodedRows coded = read_symbol_stream(model, stream, rows, entries, rows);
  size_t begin = 0, size = 0;
  for (uint32_t row = 0; row < first_row; ++row) begin += coded.counts[row];
  for (uint32_t row = 0; row < row_count; ++row) size += coded.counts[first_row + row];
  const auto keep = [](std::vector<uint32_t>& numbers, size_t first, size_t n) {
    numbers = {numbers.begin() + first, numbers.begin() + first + n};
  };
  keep(coded.counts, first_row, row_count);
  keep(coded.tails, first_row, row_count);
  keep(coded.ordinals, begin, size);
  keep(coded.codes, begin, size);
  return write_symbol_stream(model, coded);
}

CompactCodec::CompactCodec(const Layout& layout) : layout_(layout) {
  static std::atomic<uint64_t> shards{0};
  shard_ = ++shards;
}

std::shared_ptr<const EntropyModel> CompactCodec::model_of(const Frames& frames,
                                                           const Block& block) const {
  const uint64_t offset = block.header.model_offset;
  ModelCache& cache = ModelCache::instance();
  if (auto known = cache.find(shard_, offset)) return known;
  const Bytes payload = frames.model(block.header);
  std::shared_ptr<const EntropyModel> model;
  try {
    model = std::make_shared<const EntropyModel>(payload, layout_);
  } catch (const Corrupt& error) {
    refuse("its entropy model, at byte ", offset, ": ", error.what());
  }
  cache.add(shard_, offset, model);
  return model;
}

RowBuffers CompactCodec::decode(const Frames& frames, const Block& block, size_t wanted) const {
  const auto model = model_of(frames, block);
  return decode_compact(*model, block.stream, block.header.rows, block.header.entries, wanted);
}

}  // namespace logit_codec

#include "exact/codec.h"

namespace logit_codec {

std::vector<uint8_t> encode_exact(const Rows& rows) {
  std::vector<uint8_t> out;
  out.reserve(4 * rows.counts.size() + 7 * rows.ids.size());
  for (const int32_t count : rows.counts) store(out, count);
  for (const int32_t id : rows.ids)
    for (int shift = 0; shift < 24; shift += 8) out.push_back(uint8_t(id >> shift));
  for (const float logprob : rows.logprobs) store(out, logprob);
  return out;
}

RowBuffers decode_exact(const Layout& layout, Bytes stream, size_t rows, size_t entries) {
  if (stream.size() != 4 * rows + 7 * entries)
    refuse("its rows take ", stream.size(), " bytes; ", rows, " rows of ", entries,
           " entries in all take ", 4 * rows + 7 * entries);
  RowBuffers out{std::vector<int32_t>(rows), std::vector<int32_t>(entries),
                 std::vector<float>(entries)};
  load_all(stream, 0, std::span<int32_t>(out.counts));
  uint64_t counted = 0;
  for (size_t row = 0; row < rows; ++row) {
    if (out.counts[row] < 0) refuse("row ", row, " has ", out.counts[row], " entries");
    counted += uint64_t(out.counts[row]);
  }
  if (counted != entries) refuse("its rows have ", counted, " entries, its header says ", entries);
  const uint8_t* in = stream.data() + 4 * rows;
  for (int32_t& id : out.ids) {
    id = in[0] | in[1] << 8 | in[2] << 16;
    if (uint32_t(id) >= layout.vocab_size)
      refuse("id ", id, " is not in the vocabulary of ", layout.vocab_size);
    in += 3;
  }
  load_all(stream, 4 * rows + 3 * entries, std::span<float>(out.logprobs));
  return out;
}

}  // namespace logit_codec

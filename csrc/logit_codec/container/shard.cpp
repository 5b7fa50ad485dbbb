#include "container/shard.h"

#include <algorithm>
#include <limits>

namespace logit_codec {
namespace {

constexpr uint32_t kMaxRowsOfABlock = 1u << 16;

uint32_t popcount(uint32_t bits) { return uint32_t(__builtin_popcount(bits)); }

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 0) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  exponent = exponent == 31 ? 255 : exponent + 112;
  const uint32_t bits = sign | (exponent << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The values of the statistics that a block has, one statistic after another.
struct Statistics {
  Bytes values;
  uint32_t present;  // a bit for each of kStatistics
  size_t rows, value_bytes;

  float value(int which, size_t row) const {
    if (!(present >> which & 1)) return std::numeric_limits<float>::quiet_NaN();
    const uint32_t before = popcount(present & ((1u << which) - 1));
    const size_t at = (size_t(before) * rows + row) * value_bytes;
    return value_bytes == 4 ? load<float>(values, at) : half_to_float(load<uint16_t>(values, at));
  }
};

// What `work` says of a block that is wrong, with where the block lies.
template <class Work>
auto about_block(uint64_t offset, Work&& work) {
  try {
    return work();
  } catch (const Corrupt& error) {
    refuse("the block at byte ", offset, ": ", error.what());
  }
}

}  // namespace

struct Shard::DecodedBlock {
  FrameHeader header;
  RowBuffers rows;  // without padding
  Statistics statistics;

  // Row `row`, whose entries begin at `entry`, to the output's row `to`.
  void copy_row(size_t row, size_t entry, uint64_t to, const Output& out) const {
    const auto count = uint32_t(rows.counts[row]), kept = std::min(count, out.width);
    int32_t* ids = out.ids + to * out.width;
    float* logprobs = out.logprobs + to * out.width;
    std::copy_n(rows.ids.data() + entry, kept, ids);
    std::copy_n(rows.logprobs.data() + entry, kept, logprobs);
    std::fill(ids + kept, ids + out.width, -1);
    std::fill(logprobs + kept, logprobs + out.width, 0.0f);
    out.counts[to] = int32_t(kept);
    if (!out.statistics) return;
    for (int s = 0; s < kStatistics; ++s) out.statistics[s][to] = statistics.value(s, row);
  }
};

Shard::Shard(Bytes file, const Geometry& geometry, Codecs codecs)
    : index_(file, geometry), frames_(file, geometry.index_offset), codecs_(std::move(codecs)) {}

// Header of a block, with what the index says about it compared.
FrameHeader Shard::block_header(uint64_t number) const {
  const auto [row, offset] = index_.block(number);
  const FrameHeader found = frames_.header(offset);
  const uint64_t end = index_.block_end(number);
  if (found.type != kRowsFrame)
    refuse("the index has a block at byte ", offset, ", where there is an entropy model");
  if (found.row != row || row + found.rows != end)
    refuse("the block at byte ", offset, " has rows ", found.row, " to ", found.row + found.rows,
           "; the index says ", row, " to ", end);
  return found;
}

Frame Shard::block(uint64_t number) const {
  block_header(number);
  return frames_.frame(index_.block(number).second);
}

const Codec& Shard::codec_of(const Frame& frame) const {
  const auto found = codecs_.find(frame.header.codec);
  if (found == codecs_.end())
    refuse("the block at byte ", frame.offset, " is of codec number ", int(frame.header.codec),
           ", which the store's manifest does not name");
  return *found->second;
}

// At least the first `wanted` rows of a block.
Shard::DecodedBlock Shard::decode(uint64_t number, size_t wanted) const {
  const Frame frame = block(number);
  const FrameHeader& header = frame.header;
  const Codec& codec = codec_of(frame);
  return about_block(frame.offset, [&]() -> DecodedBlock {
    if (header.statistics >> kStatistics)
      refuse("its header names statistics by the bits ", int(header.statistics), "; the lowest ",
             kStatistics, " bits have a meaning");
    if (header.rows > kMaxRowsOfABlock)
      refuse("its header says ", header.rows, " rows; a block has ", kMaxRowsOfABlock, " at most");
    const uint64_t statistics_at = uint64_t(header.digests) * 8;
    const uint64_t statistics_bytes =
        uint64_t(header.rows) * popcount(header.statistics) * codec.statistic_bytes();
    const Bytes values = part(frame.payload, statistics_at, statistics_bytes);
    const Bytes stream = frame.payload.subspan(statistics_at + statistics_bytes);
    return {header,
            codec.decode(frames_, {frame.offset, header, stream},
                         std::min<size_t>(wanted, header.rows)),
            {values, header.statistics, header.rows, codec.statistic_bytes()}};
  });
}

void Shard::check_range(uint64_t begin, uint64_t end) const {
  const Geometry& geometry = index_.geometry();
  if (begin > end || end > geometry.rows)
    refuse<std::out_of_range>("rows ", begin, " to ", end, " of a shard of ", geometry.rows);
  if (begin < end && geometry.blocks == 0)
    refuse("the shard has ", geometry.rows, " rows and no block");
}

uint32_t Shard::max_count(uint64_t begin, uint64_t end) const {
  check_range(begin, end);
  uint32_t most = 0;
  if (begin == end) return 0;
  for (uint64_t number = index_.find_block(begin); begin < end; ++number) {
    const FrameHeader found = block_header(number);
    most = std::max<uint32_t>(most, found.max_count);
    begin = found.row + found.rows;
  }
  return most;
}

void Shard::read(uint64_t begin, uint64_t end, const Output& out) const {
  check_range(begin, end);
  if (begin == end) return;
  const uint64_t first_row = begin;
  for (uint64_t number = index_.find_block(begin); begin < end; ++number) {
    const FrameHeader found = block_header(number);
    if (begin < found.row || begin - found.row >= found.rows)
      refuse("the index has no block for row ", begin, ": the nearest has rows ", found.row, " to ",
             found.row + found.rows);
    const auto stop = size_t(std::min<uint64_t>(end - found.row, found.rows));
    const DecodedBlock decoded = decode(number, stop);
    size_t entry = 0;
    for (size_t row = 0; row < stop; ++row) {
      if (found.row + row >= begin) decoded.copy_row(row, entry, found.row + row - first_row, out);
      entry += size_t(decoded.rows.counts[row]);
    }
    begin = found.row + stop;
  }
}

void Shard::check_block(uint64_t number) const {
  const FrameHeader found = block_header(number);
  const uint64_t offset = index_.block(number).second;
  if (number == 0 && found.row != 0)
    refuse("the first block, at byte ", offset, ", begins at row ", found.row, ", not at 0");
  const DecodedBlock decoded = decode(number, found.rows);
  const std::vector<int32_t>& counts = decoded.rows.counts;
  const auto most = std::max_element(counts.begin(), counts.end());
  if (most != counts.end() && *most != found.max_count)
    refuse("the block at byte ", offset, " has a row of ", *most,
           " entries; its header says that the longest has ", found.max_count);
}

void Shard::check_frames() const {
  std::map<uint64_t, uint64_t> end_of;  // by offset
  for (uint64_t number = 0; number < index_.geometry().blocks; ++number) {
    const FrameHeader found = block_header(number);
    const uint64_t offset = index_.block(number).second;
    end_of[offset] = offset + sizeof(FrameHeader) + found.payload_bytes;
    if (found.model_offset && !end_of.count(found.model_offset)) {
      about_block(offset, [&] { return frames_.model(found); });
      end_of[found.model_offset] = frames_.frame(found.model_offset).end();
    }
  }
  uint64_t at = kShardHeaderBytes;
  while (at != frames_.end()) {
    if (const auto known = end_of.find(at); known != end_of.end()) {
      at = known->second;
      continue;
    }
    const Frame frame = frames_.frame(at);
    if (frame.header.type != kModelFrame) refuse("the block at byte ", at, " is not in the index");
    at = frame.end();
  }
}

}  // namespace logit_codec

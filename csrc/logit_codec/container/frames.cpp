#include "container/frames.h"

#include <ios>

namespace logit_codec {
namespace {

const char* name_of(const FrameHeader& header) {
  return header.type == kModelFrame ? "entropy model" : "block";
}

bool is_header(Bytes bytes) {
  const auto header = load<FrameHeader>(bytes, 0);
  return header.magic == kFrameMagic && crc32(bytes.subspan(0, 44)) == header.crc;
}

}  // namespace

FrameHeader Frames::header(uint64_t offset) const {
  if (offset < kShardHeaderBytes || offset >= end_)
    refuse("a block is looked for at byte ", offset, "; blocks lie from byte ", kShardHeaderBytes,
           " to byte ", end_);
  const Bytes bytes = part(file_, offset, sizeof(FrameHeader));
  if (!is_header(bytes))
    refuse("the header of the block at byte ", offset,
           " is damaged: its first bytes or its CRC-32 are not those of a block");
  return load<FrameHeader>(bytes, 0);
}

Frame Frames::frame(uint64_t offset) const {
  const FrameHeader found = header(offset);
  const Bytes payload = part(file_, offset + sizeof(FrameHeader), found.payload_bytes);
  const uint32_t crc = crc32(payload);
  if (crc != found.payload_crc)
    refuse("the ", name_of(found), " at byte ", offset, " is damaged: the CRC-32 of its ",
           found.payload_bytes, " bytes is ", std::hex, crc, ", its header says ",
           found.payload_crc);
  return {offset, found, payload};
}

Bytes Frames::model(const FrameHeader& block) const {
  const uint64_t offset = block.model_offset;
  const bool is_inside =
      offset >= kShardHeaderBytes && offset < end_ && end_ - offset >= sizeof(FrameHeader);
  if (!is_inside || !is_header(part(file_, offset, sizeof(FrameHeader))) ||
      header(offset).type != kModelFrame)
    refuse("it references byte ", offset, ", which holds no entropy model");
  return frame(offset).payload;
}

}  // namespace logit_codec

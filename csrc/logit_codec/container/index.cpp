#include "container/index.h"

#include <algorithm>

namespace logit_codec {

Index::Index(Bytes file, const Geometry& geometry) : geometry_(geometry) {
  const uint64_t documents = geometry.documents, blocks = geometry.blocks;
  if (documents >= file.size() / 8 || blocks >= file.size() / 8)
    refuse("a file of ", file.size(), " bytes is too short for the index of ", documents,
           " documents and ", blocks, " blocks");
  first_block_word_ = documents + 1 + (geometry.bound ? documents : 0);
  const uint64_t expected = 8 * (first_block_word_ + 2 * blocks);
  if (geometry.index_bytes != expected)
    refuse("the index of ", documents, " documents and ", blocks, " blocks takes ", expected,
           " bytes, the footer says ", geometry.index_bytes);
  const uint64_t pages = (geometry.index_bytes + kIndexPageBytes - 1) / kIndexPageBytes;
  words_ = part(file, geometry.index_offset, geometry.index_bytes);
  page_crcs_ = part(file, geometry.index_offset + geometry.index_bytes, 4 * pages);
  page_is_intact_.reset(new std::atomic<uint8_t>[pages]());
}

uint64_t Index::word(uint64_t number) const {
  const uint64_t page = number * 8 / kIndexPageBytes;
  if (!page_is_intact_[page].load(std::memory_order_relaxed)) {
    const uint64_t begin = page * kIndexPageBytes;
    const uint64_t size = std::min<uint64_t>(kIndexPageBytes, words_.size() - begin);
    if (crc32(words_.subspan(begin, size)) != load<uint32_t>(page_crcs_, 4 * page))
      refuse("page ", page, " of the index, at byte ", geometry_.index_offset + begin,
             ", is damaged: its CRC-32 is another than the one behind the index");
    page_is_intact_[page].store(1, std::memory_order_relaxed);
  }
  return load<uint64_t>(words_, number * 8);
}

std::pair<uint64_t, uint64_t> Index::document_rows(uint64_t document) const {
  if (document >= geometry_.documents)
    refuse<std::out_of_range>("document ", document, " of a shard of ", geometry_.documents);
  const uint64_t begin = word(document), end = word(document + 1);
  if (begin > end || end > geometry_.rows)
    refuse("the index gives document ", document, " of the shard rows ", begin, " to ", end,
           "; they must rise to ", geometry_.rows, " at most");
  return {begin, end};
}

uint64_t Index::digest(uint64_t document) const {
  if (!geometry_.bound || document >= geometry_.documents)
    refuse<std::out_of_range>("the token digest of document ", document, " of a shard with ",
                              geometry_.bound ? geometry_.documents : 0);
  return word(geometry_.documents + 1 + document);
}

std::pair<uint64_t, uint64_t> Index::block(uint64_t number) const {
  if (number >= geometry_.blocks)
    refuse<std::out_of_range>("block ", number, " of a shard of ", geometry_.blocks);
  const uint64_t at = first_block_word_ + 2 * number;
  return {word(at), word(at + 1)};
}

uint64_t Index::block_end(uint64_t number) const {
  return number + 1 < geometry_.blocks ? block(number + 1).first : geometry_.rows;
}

uint64_t Index::find_block(uint64_t row) const {
  uint64_t low = 0, high = geometry_.blocks;
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    (block(middle).first <= row ? low : high) = middle;
  }
  return low;
}

void Index::check() const {
  for (uint64_t document = 0; document < geometry_.documents; ++document) document_rows(document);
  if (word(0) != 0 || word(geometry_.documents) != geometry_.rows)
    refuse("the documents of the index have rows ", word(0), " to ", word(geometry_.documents),
           "; the shard has rows 0 to ", geometry_.rows);
  for (uint64_t number = 0; number < geometry_.blocks; ++number) block(number);
  if (geometry_.rows && !geometry_.blocks)
    refuse("the shard has ", geometry_.rows, " rows and no block");
}

}  // namespace logit_codec

// The index of a shard: documents' rows, digests of their tokens, and where the blocks lie.  A page
// is checked when it is first read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "bytes.h"

namespace logit_codec {

inline constexpr uint32_t kIndexPageBytes = 4096;

// Where the parts of a shard lie, from its header and footer.
struct Geometry {
  uint64_t rows, documents, blocks;
  uint64_t index_offset, index_bytes;
  bool bound;  // there are token digests
};

class Index {
 public:
  Index(Bytes file, const Geometry& geometry);

  const Geometry& geometry() const { return geometry_; }

  // First row of a document and the one after its last.
  std::pair<uint64_t, uint64_t> document_rows(uint64_t document) const;
  uint64_t digest(uint64_t document) const;

  // First row and file offset of a block.
  std::pair<uint64_t, uint64_t> block(uint64_t number) const;
  // The row after the last of a block.
  uint64_t block_end(uint64_t number) const;
  // The last block whose first row is `row` or before it.
  uint64_t find_block(uint64_t row) const;

  // Throws Corrupt unless the whole index is intact.
  void check() const;

 private:
  uint64_t word(uint64_t number) const;

  Geometry geometry_;
  uint64_t first_block_word_;
  Bytes words_, page_crcs_;
  std::unique_ptr<std::atomic<uint8_t>[]> page_is_intact_;
};

}  // namespace logit_codec

// A finished shard in memory: finds and decodes the blocks of a range of rows.
//
// Every byte is checked before it is used: index pages, block headers, payloads and tables carry
// CRC-32s, and whatever passes them is still bounds-checked.  Any number of threads may read.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "compact/entropy_model.h"

namespace logit_codec {

inline constexpr uint32_t kShardHeader = 64, kIndexPage = 4096;
inline constexpr int kStatistics = 3;  // label_logprob, entropy, std

// The 48 bytes before a block or tables.
struct FrameHeader {
    uint32_t magic;
    uint8_t type, codec, statistics, zero;
    uint32_t rows, payload_bytes;
    uint64_t row, tables_offset;
    uint32_t entries;
    uint16_t max_count, digests;
    uint32_t payload_crc, crc;
};
static_assert(sizeof(FrameHeader) == 48);

inline constexpr uint32_t kFrameMagic = 0x4B424450;  // "PDBK"
inline constexpr uint8_t kTablesFrame = 1, kRowsFrame = 2;
inline constexpr uint8_t kExact = 0, kCompact = 1;

// Where the parts of a shard lie, from its header and footer.
struct Geometry {
    uint64_t rows, documents, blocks;
    uint64_t index_offset, index_bytes;
    bool bound;  // there are token digests
};

// Padded output: ids and logprobs [rows, width], counts [rows].  Rows with more than `width`
// entries keep the likeliest.  statistics: three pointers to [rows], all or none.
struct Output {
    int32_t* ids;
    float* logprobs;
    int32_t* counts;
    uint32_t width;
    float* const* statistics = nullptr;
};

class Shard {
   public:
    Shard(Bytes file, const Geometry& geometry, const Layout& layout);

    // First row of a document and the one after its last.
    std::pair<uint64_t, uint64_t> document_rows(uint64_t document) const;
    uint64_t digest(uint64_t document) const;

    // First row and file offset of a block.
    std::pair<uint64_t, uint64_t> block(uint64_t index) const;

    // The most entries that a row in blocks of [begin, end) has.
    uint32_t max_count(uint64_t begin, uint64_t end) const;
    void read(uint64_t begin, uint64_t end, const Output& out) const;

    // Throws Corrupt unless block `index` is intact, decodes, and ends where the next begins.
    void check_block(uint64_t index) const;
    void check_index() const;
    // Throws Corrupt unless intact frames fill the file from its header to its index: also those
    // that no read comes by, such as tables that a crash left unused.
    void check_frames() const;

    // The header at `offset` and its payload, both checked.
    std::pair<FrameHeader, Bytes> frame(uint64_t offset) const;
    std::shared_ptr<const Tables> tables(uint64_t offset) const;

   private:
    uint64_t index_word(uint64_t number) const;
    uint64_t find_block(uint64_t row) const;
    FrameHeader header(uint64_t offset) const;
    FrameHeader rows_header(uint64_t index) const;
    void check_range(uint64_t begin, uint64_t end) const;

    Bytes file_, index_, page_crcs_;
    Geometry geometry_;
    Layout layout_;
    uint64_t first_block_word_;
    uint64_t uid_;
    std::unique_ptr<std::atomic<uint8_t>[]> page_is_intact_;
};

}  // namespace logit_codec

#include "container/shard.h"

#include <pthread.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "compact/block.h"
#include "compact/symbol_stream.h"

namespace logit_codec {
namespace {

// Parsed tables of the shards in use: about 1.3 MB each at a vocabulary of 150,000, so a store of
// thousands of shards cannot keep all of them.
class TablesCache {
   public:
    static TablesCache& instance() {
        static TablesCache cache;
        return cache;
    }

    std::shared_ptr<const Tables> find(uint64_t shard, uint64_t offset) {
        const std::lock_guard lock(mutex_);
        for (Entry& entry : entries_) {
            if (entry.shard == shard && entry.offset == offset) {
                entry.used = ++clock_;
                return entry.tables;
            }
        }
        return nullptr;
    }

    void add(uint64_t shard, uint64_t offset, std::shared_ptr<const Tables> tables) {
        const std::lock_guard lock(mutex_);
        bytes_ += tables->bytes();
        while (bytes_ > kCapacity && !entries_.empty()) {
            const auto older = [](const Entry& a, const Entry& b) { return a.used < b.used; };
            const auto oldest = std::min_element(entries_.begin(), entries_.end(), older);
            bytes_ -= oldest->tables->bytes();
            entries_.erase(oldest);
        }
        entries_.push_back({shard, offset, ++clock_, std::move(tables)});
    }

   private:
    struct Entry {
        uint64_t shard, offset, used;
        std::shared_ptr<const Tables> tables;
    };
    static constexpr size_t kCapacity = 256 << 20;

    // A DataLoader worker may be forked while another thread reads: no lock may be lost in it.
    TablesCache() {
        pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                       [] { instance().mutex_.unlock(); });
    }

    std::mutex mutex_;
    std::vector<Entry> entries_;
    size_t bytes_ = 0;
    uint64_t clock_ = 0;
};

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

// A block's rows without padding, and the bytes of its statistics.
struct Block {
    std::vector<int32_t> counts, ids;
    std::vector<float> logprobs;
    Bytes statistics;
    size_t rows = 0, value_bytes = 0;

    float statistic(uint8_t present, int which, size_t row) const {
        if (!(present >> which & 1)) return std::numeric_limits<float>::quiet_NaN();
        const int before = __builtin_popcount(present & ((1u << which) - 1));
        const size_t at = (size_t(before) * rows + row) * value_bytes;
        return value_bytes == 4 ? load<float>(statistics, at)
                                : half_to_float(load<uint16_t>(statistics, at));
    }
};

uint32_t popcount(uint32_t bits) { return uint32_t(__builtin_popcount(bits)); }

}  // namespace

Shard::Shard(Bytes file, const Geometry& geometry, const Layout& layout)
    : file_(file), geometry_(geometry), layout_(layout) {
    static std::atomic<uint64_t> shards{0};
    uid_ = ++shards;
    const uint64_t documents = geometry.documents, blocks = geometry.blocks;
    if (documents >= file.size() / 8 || blocks >= file.size() / 8)
        throw Corrupt("the file is too short for its index");
    first_block_word_ = documents + 1 + (geometry.bound ? documents : 0);
    if (geometry.index_bytes != 8 * (first_block_word_ + 2 * blocks))
        throw Corrupt("the index has another size than its documents and blocks need");
    const uint64_t pages = (geometry.index_bytes + kIndexPage - 1) / kIndexPage;
    index_ = part(file, geometry.index_offset, geometry.index_bytes);
    page_crcs_ = part(file, geometry.index_offset + geometry.index_bytes, 4 * pages);
    page_is_intact_.reset(new std::atomic<uint8_t>[pages]());
}

uint64_t Shard::index_word(uint64_t number) const {
    const uint64_t page = number * 8 / kIndexPage;
    if (!page_is_intact_[page].load(std::memory_order_relaxed)) {
        const uint64_t begin = page * kIndexPage;
        const uint64_t size = std::min<uint64_t>(kIndexPage, index_.size() - begin);
        if (crc32(index_.subspan(begin, size)) != load<uint32_t>(page_crcs_, 4 * page))
            throw Corrupt("page " + std::to_string(page) + " of the index is damaged");
        page_is_intact_[page].store(1, std::memory_order_relaxed);
    }
    return load<uint64_t>(index_, number * 8);
}

std::pair<uint64_t, uint64_t> Shard::document_rows(uint64_t document) const {
    if (document >= geometry_.documents) throw std::out_of_range("no such document in the shard");
    const uint64_t begin = index_word(document), end = index_word(document + 1);
    if (begin > end || end > geometry_.rows) throw Corrupt("documents overlap in the index");
    return {begin, end};
}

uint64_t Shard::digest(uint64_t document) const {
    if (!geometry_.bound || document >= geometry_.documents)
        throw std::out_of_range("no such digest in the shard");
    return index_word(geometry_.documents + 1 + document);
}

std::pair<uint64_t, uint64_t> Shard::block(uint64_t index) const {
    if (index >= geometry_.blocks) throw std::out_of_range("no such block in the shard");
    const uint64_t word = first_block_word_ + 2 * index;
    return {index_word(word), index_word(word + 1)};
}

uint64_t Shard::find_block(uint64_t row) const {
    uint64_t low = 0, high = geometry_.blocks;  // the last block whose first row is <= row
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        (block(middle).first <= row ? low : high) = middle;
    }
    return low;
}

FrameHeader Shard::header(uint64_t offset) const {
    const auto where = [&] { return " at byte " + std::to_string(offset); };
    if (offset >= geometry_.index_offset) throw Corrupt("the index points behind the blocks");
    const Bytes bytes = part(file_, offset, sizeof(FrameHeader));
    const auto header = load<FrameHeader>(bytes, 0);
    if (header.magic != kFrameMagic || crc32(bytes.subspan(0, 44)) != header.crc)
        throw Corrupt("the header of the block" + where() + " is damaged");
    return header;
}

std::pair<FrameHeader, Bytes> Shard::frame(uint64_t offset) const {
    const FrameHeader found = header(offset);
    const Bytes payload = part(file_, offset + sizeof(FrameHeader), found.payload_bytes);
    if (crc32(payload) != found.payload_crc)
        throw Corrupt("the block at byte " + std::to_string(offset) + " is damaged");
    return {found, payload};
}

// Header of a block, with what the index says about it compared.
FrameHeader Shard::rows_header(uint64_t index) const {
    const auto [row, offset] = block(index);
    const FrameHeader found = header(offset);
    const uint64_t end = index + 1 < geometry_.blocks ? block(index + 1).first : geometry_.rows;
    if (found.type != kRowsFrame || found.row != row || row + found.rows != end)
        throw Corrupt("the block at byte " + std::to_string(offset) +
                      " is not the one of rows " + std::to_string(row) + " to " +
                      std::to_string(end));
    return found;
}

std::shared_ptr<const Tables> Shard::tables(uint64_t offset) const {
    TablesCache& cache = TablesCache::instance();
    if (auto known = cache.find(uid_, offset)) return known;
    const auto [found, payload] = frame(offset);
    if (found.type != kTablesFrame) throw Corrupt("a block names tables that are none");
    auto parsed = std::make_shared<const Tables>(payload, layout_);
    cache.add(uid_, offset, parsed);
    return parsed;
}

namespace {

constexpr uint32_t kMostRows = 1u << 16;

// The first `wanted` rows of a block at least.
Block decode_block(const Shard& shard, const Layout& layout, uint64_t offset, size_t wanted) {
    const auto [header, payload] = shard.frame(offset);
    if (header.statistics >> kStatistics) throw Corrupt("a block with unknown statistics");
    Block block;
    block.value_bytes = header.codec == kExact ? 4 : 2;
    const uint64_t statistics_at = uint64_t(header.digests) * 8;
    const uint64_t statistics_bytes =
        uint64_t(header.rows) * popcount(header.statistics) * block.value_bytes;
    block.statistics = part(payload, statistics_at, statistics_bytes);
    const Bytes stream = payload.subspan(statistics_at + statistics_bytes);
    if (header.rows > kMostRows) throw Corrupt("a block with too many rows");
    check_size(header.entries, stream,
               header.codec == kExact ? kExactEntriesPerByte : kCompactEntriesPerByte);
    block.rows = header.rows;
    block.counts.resize(header.codec == kExact ? header.rows : std::min<size_t>(wanted, header.rows));
    block.ids.resize(header.entries);
    block.logprobs.resize(header.entries);
    if (header.codec == kExact)
        decode_exact(stream, layout, block.counts, block.ids, block.logprobs);
    else if (header.codec == kCompact)
        decode_compact(*shard.tables(header.tables_offset), stream, header.rows, block.counts,
                       block.ids, block.logprobs);
    else
        throw Corrupt("a block of an unknown codec");
    return block;
}

void copy_row(const Block& block, size_t row, size_t entry, uint8_t statistics, uint64_t to,
              const Output& out) {
    const auto count = uint32_t(block.counts[row]), kept = std::min(count, out.width);
    int32_t* ids = out.ids + to * out.width;
    float* logprobs = out.logprobs + to * out.width;
    std::copy_n(block.ids.data() + entry, kept, ids);
    std::copy_n(block.logprobs.data() + entry, kept, logprobs);
    std::fill(ids + kept, ids + out.width, -1);
    std::fill(logprobs + kept, logprobs + out.width, 0.0f);
    out.counts[to] = int32_t(kept);
    if (!out.statistics) return;
    for (int s = 0; s < kStatistics; ++s)
        out.statistics[s][to] = block.statistic(statistics, s, row);
}

}  // namespace

void Shard::check_range(uint64_t begin, uint64_t end) const {
    if (begin > end || end > geometry_.rows) throw std::out_of_range("no such rows in the shard");
    if (begin < end && geometry_.blocks == 0) throw Corrupt("rows, but no blocks");
}

uint32_t Shard::max_count(uint64_t begin, uint64_t end) const {
    check_range(begin, end);
    uint32_t most = 0;
    if (begin == end) return 0;
    for (uint64_t index = find_block(begin); begin < end; ++index) {
        const FrameHeader found = rows_header(index);
        most = std::max<uint32_t>(most, found.max_count);
        begin = found.row + found.rows;
    }
    return most;
}

void Shard::read(uint64_t begin, uint64_t end, const Output& out) const {
    check_range(begin, end);
    if (begin == end) return;
    const uint64_t first_row = begin;
    for (uint64_t index = find_block(begin); begin < end; ++index) {
        const FrameHeader found = rows_header(index);
        if (begin < found.row || begin - found.row >= found.rows)
            throw Corrupt("the index has no block for row " + std::to_string(begin));
        const auto stop = size_t(std::min<uint64_t>(end - found.row, found.rows));
        const Block decoded = decode_block(*this, layout_, block(index).second, stop);
        size_t entry = 0;
        for (size_t row = 0; row < stop; ++row) {
            if (found.row + row >= begin)
                copy_row(decoded, row, entry, found.statistics, found.row + row - first_row, out);
            entry += size_t(decoded.counts[row]);
        }
        begin = found.row + stop;
    }
}

void Shard::check_block(uint64_t index) const {
    const FrameHeader found = rows_header(index);
    if (index == 0 && found.row != 0) throw Corrupt("the first block does not begin at row 0");
    const Block decoded = decode_block(*this, layout_, block(index).second, found.rows);
    const auto most = std::max_element(decoded.counts.begin(), decoded.counts.end());
    if (most != decoded.counts.end() && *most != found.max_count)
        throw Corrupt("a block's header names another longest row than it has");
}

void Shard::check_frames() const {
    std::map<uint64_t, uint64_t> end_of;  // by offset
    const auto add = [&](uint64_t offset, const FrameHeader& found) {
        end_of[offset] = offset + sizeof(FrameHeader) + found.payload_bytes;
    };
    for (uint64_t index = 0; index < geometry_.blocks; ++index) {
        const FrameHeader found = rows_header(index);
        add(block(index).second, found);
        if (found.codec == kCompact && !end_of.count(found.tables_offset))
            add(found.tables_offset, frame(found.tables_offset).first);
    }
    uint64_t at = kShardHeader;
    while (at != geometry_.index_offset) {
        if (const auto known = end_of.find(at); known != end_of.end()) {
            at = known->second;
            continue;
        }
        const FrameHeader found = frame(at).first;
        if (found.type != kTablesFrame)
            throw Corrupt("the block at byte " + std::to_string(at) + " is not in the index");
        at += sizeof(FrameHeader) + found.payload_bytes;
    }
}

void Shard::check_index() const {
    for (uint64_t document = 0; document < geometry_.documents; ++document)
        document_rows(document);
    if (index_word(0) != 0 || index_word(geometry_.documents) != geometry_.rows)
        throw Corrupt("the documents in the index do not cover the shard's rows");
    for (uint64_t index = 0; index < geometry_.blocks; ++index) block(index);
    if (geometry_.rows && !geometry_.blocks) throw Corrupt("rows, but no blocks");
}

}  // namespace logit_codec

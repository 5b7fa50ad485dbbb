#include "compact/block.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "compact/symbol_stream.h"

namespace logit_codec {
namespace {

uint32_t draws_of(const Layout& layout, float logprob) {
    return uint32_t(std::lround(std::exp(double(logprob)) * layout.draws));
}

void check_row(const Layout& layout, Span<const int32_t> ids, Span<const float> logprobs,
               std::vector<int32_t>& sorted) {
    uint64_t draws = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || uint32_t(ids[i]) >= layout.vocab_size)
            throw BadRows("id " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                          std::to_string(layout.vocab_size));
        if (!std::isfinite(logprobs[i]) || logprobs[i] > 1e-3f)
            throw BadRows("log-probability " + std::to_string(logprobs[i]) +
                          " is not finite and at most 0");
        if (i && logprobs[i] > logprobs[i - 1])
            throw BadRows("the entries do not come by falling log-probability");
        if (layout.draws && draws_of(layout, logprobs[i]) == 0)
            throw BadRows("an entry of a sampled row has no draw");
        draws += draws_of(layout, logprobs[i]);
    }
    if (layout.draws && !ids.empty() && draws != layout.draws)
        throw BadRows("the draws sum to " + std::to_string(draws) + ", not to " +
                      std::to_string(layout.draws));
    sorted.assign(ids.begin(), ids.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) throw BadRows("id " + std::to_string(*twice) + " comes twice");
}

// Entries of one value come by rank: their order says nothing, and sorted ranks need fewer bits.
void sort_ties(Span<uint32_t> ranks, const uint32_t* codes) {
    for (size_t begin = 0, end; begin < ranks.size(); begin = end) {
        for (end = begin + 1; end < ranks.size() && codes[end] == codes[begin];) ++end;
        std::sort(ranks.begin() + begin, ranks.begin() + end);
    }
}

// ranks[i]: of ids[i], but for the order of ties.
void rank_row(const Layout& layout, const Ranks& ranks, const RankOfId& rank_of_id,
              Span<const int32_t> ids, const uint32_t* codes, Span<uint32_t> out) {
    if (ids.empty()) return;
    for (size_t i = 0; i < ids.size(); ++i) out[i] = rank_of_id.first(uint32_t(ids[i]));
    if (layout.draws) {  // none of the most drawn is the first by itself
        size_t tied = 1;
        while (tied < out.size() && codes[tied] == codes[0]) ++tied;
        std::swap(out[0], *std::min_element(out.begin(), out.begin() + tied));
    }
    const uint32_t of_class = ranks.class_of(out[0]);
    for (size_t i = 1; i < out.size(); ++i) out[i] = rank_of_id.in_class(of_class, out[i]);
    sort_ties(out.subspan(1), codes + 1);
}

void id_row(const Ranks& ranks, Span<const uint32_t> row, int32_t* ids) {
    if (row.empty()) return;
    const uint32_t of_class = ranks.class_of(row[0]);
    ids[0] = int32_t(ranks.first_id(row[0]));
    for (size_t i = 1; i < row.size(); ++i) ids[i] = int32_t(ranks.id(of_class, row[i]));
}

}  // namespace

void check_rows(const Layout& layout, const Rows& rows) {
    std::vector<int32_t> scratch;
    size_t entry = 0;
    for (size_t row = 0; row < rows.counts.size(); ++row) {
        const auto count = size_t(rows.counts[row]);
        try {
            check_row(layout, rows.ids.subspan(entry, count), rows.logprobs.subspan(entry, count),
                      scratch);
        } catch (const BadRows& error) {
            throw BadRows("row " + std::to_string(row) + ": " + error.what());
        }
        entry += count;
    }
}

CodedRows code_rows(const Layout& layout, const Grid& grid, const Ranks& ranks,
                    const RankOfId& rank_of_id, const Rows& rows) {
    CodedRows coded;
    coded.counts.assign(rows.counts.begin(), rows.counts.end());
    coded.tails.resize(rows.counts.size());
    coded.ranks.resize(rows.ids.size());
    coded.codes.resize(rows.ids.size());
    size_t entry = 0;
    for (size_t row = 0; row < rows.counts.size(); ++row) {
        const size_t count = coded.counts[row];
        const Span<const float> logprobs = rows.logprobs.subspan(entry, count);
        uint32_t* codes = coded.codes.data() + entry;
        if (layout.draws)
            for (size_t i = 0; i < count; ++i) codes[i] = draws_of(layout, logprobs[i]);
        else
            coded.tails[row] = grid.encode(logprobs, codes);
        rank_row(layout, ranks, rank_of_id, rows.ids.subspan(entry, count), codes,
                 {coded.ranks.data() + entry, count});
        entry += count;
    }
    return coded;
}

std::vector<uint8_t> encode_compact(const Tables& tables, const RankOfId& rank_of_id,
                                    const Rows& rows) {
    return write_numbers(
        tables, code_rows(tables.layout(), tables.grid(), tables.ranks(), rank_of_id, rows));
}

void decode_compact(const Tables& tables, Bytes bytes, size_t rows, Span<int32_t> counts,
                    Span<int32_t> ids, Span<float> logprobs) {
    const CodedRows coded = read_numbers(tables, bytes, rows, ids.size(), counts.size());
    std::copy(coded.counts.begin(), coded.counts.end(), counts.begin());
    const uint32_t draws = tables.layout().draws;
    std::vector<float> log_share(draws + 1);
    for (uint32_t n = 1; n <= draws; ++n) log_share[n] = float(std::log(double(n) / draws));
    size_t entry = 0;
    for (size_t row = 0; row < coded.counts.size(); ++row) {
        const size_t count = coded.counts[row];
        const Span<const uint32_t> codes(coded.codes.data() + entry, count);
        id_row(tables.ranks(), {coded.ranks.data() + entry, count}, ids.data() + entry);
        if (draws)
            for (size_t i = 0; i < count; ++i) logprobs[entry + i] = log_share[codes[i]];
        else
            tables.grid().decode(codes, coded.tails[row], logprobs.data() + entry);
        entry += count;
    }
}

std::vector<uint8_t> slice_compact(const Tables& tables, Bytes bytes, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count) {
    CodedRows coded = read_numbers(tables, bytes, rows, entries, rows);
    size_t begin = 0, size = 0;
    for (uint32_t row = 0; row < first_row; ++row) begin += coded.counts[row];
    for (uint32_t row = 0; row < row_count; ++row) size += coded.counts[first_row + row];
    const auto keep = [](std::vector<uint32_t>& numbers, size_t first, size_t n) {
        numbers = {numbers.begin() + first, numbers.begin() + first + n};
    };
    keep(coded.counts, first_row, row_count);
    keep(coded.tails, first_row, row_count);
    keep(coded.ranks, begin, size);
    keep(coded.codes, begin, size);
    return write_numbers(tables, coded);
}

std::vector<uint8_t> encode_exact(const Rows& rows) {
    std::vector<uint8_t> out;
    out.reserve(4 * rows.counts.size() + 7 * rows.ids.size());
    for (const int32_t count : rows.counts) store(out, count);
    for (const int32_t id : rows.ids)
        for (int shift = 0; shift < 24; shift += 8) out.push_back(uint8_t(id >> shift));
    for (const float logprob : rows.logprobs) store(out, logprob);
    return out;
}

void decode_exact(Bytes bytes, const Layout& layout, Span<int32_t> counts,
                  Span<int32_t> ids, Span<float> logprobs) {
    if (bytes.size() != 4 * counts.size() + 7 * ids.size())
        throw Corrupt("an exact block has another size than its rows need");
    uint64_t entries = 0;
    load_all(bytes, 0, counts);
    for (const int32_t count : counts) {
        if (count < 0) throw Corrupt("a negative count");
        entries += uint64_t(count);
    }
    if (entries != ids.size()) throw Corrupt("the counts do not sum to the block's entries");
    const uint8_t* in = bytes.data() + counts.size_bytes();
    for (int32_t& id : ids) {
        id = in[0] | in[1] << 8 | in[2] << 16;
        if (uint32_t(id) >= layout.vocab_size) throw Corrupt("an id beyond the vocabulary");
        in += 3;
    }
    load_all(bytes, 4 * counts.size() + 3 * ids.size(), logprobs);
}

}  // namespace logit_codec

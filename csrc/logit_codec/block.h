// Rows of a block to bytes and back.
#pragma once

#include <vector>

#include "tables.h"

namespace logit_codec {

// Throws BadRows where a row is not what a store holds: ids in the vocabulary and different from
// each other, log-probabilities finite, at most 0 and falling, draws that sum up.
void check_rows(const Layout& layout, const Rows& rows);

// No memory is taken for what a header claims before the size of its stream has borne it out.
// In `compact` a symbol takes at least 1/1470 bits, for the escape has a frequency too.
inline constexpr double kExactEntriesPerByte = 1.0 / 7, kCompactEntriesPerByte = 8 * 1024;
void check_size(uint64_t entries, Bytes stream, double entries_per_byte);

// `exact`: counts, ids of three bytes, float32 log-probabilities.
std::vector<uint8_t> encode_exact(const Rows& rows);

// Writes ids and log-probabilities of a block that has `entries` of them, and its rows' counts.
void decode_exact(Bytes bytes, const Layout& layout, Span<int32_t> counts,
                  Span<int32_t> ids, Span<float> logprobs);

// `compact`.  rank_of_id: of `tables`.
std::vector<uint8_t> encode_compact(const Tables& tables, Span<const uint32_t> rank_of_id,
                                    const Rows& rows);
// Decodes the first counts.size() of a stream's `rows` rows; ids and logprobs have room for all its
// entries.  Only a whole stream is checked to end where its rows do.
void decode_compact(const Tables& tables, Bytes bytes, size_t rows, Span<int32_t> counts,
                    Span<int32_t> ids, Span<float> logprobs);

// The stream of `row_count` of the rows of a `compact` stream, bit-exact in what it decodes to.
std::vector<uint8_t> slice_compact(const Tables& tables, Bytes bytes, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count);

CodedRows code_rows(const Layout& layout, const Grid& grid, Span<const uint32_t> rank_of_id,
                    const Rows& rows);

// Calls put(state, context, number) for every number of the rows in the order of reading.
template <class Put>
void for_each_number(const Layout& layout, const Grid& grid, const CodedRows& rows, Put&& put) {
    size_t entry = 0;
    uint32_t previous_count = 0;
    for (const uint32_t count : rows.counts) {
        const uint32_t* ranks = rows.ranks.data() + entry;
        const uint32_t* codes = rows.codes.data() + entry;
        entry += count;
        if (!layout.draws) {
            put(1, kCountContext + octave_context(previous_count, kCountContexts), count);
            previous_count = count;
            for (uint32_t i = 0; i < count; ++i) {
                if (i == 0) {
                    const int context = octave_context(count, kFirstValueContexts);
                    put(1, kFirstValueContext + context, grid.size() - 1 - codes[0]);
                    put(0, 0, ranks[0]);
                } else {
                    const int context = next_value_context(layout, codes[i - 1]);
                    put(1, context, grid.highest(codes[i - 1]) - codes[i]);
                    put(0, id_context(ranks[i - 1]), ranks[i]);
                }
            }
            continue;
        }
        uint32_t left = layout.draws, last = layout.draws;
        if (count == 0) put(1, kFirstValueContext, left);
        for (uint32_t i = 0; i < count; ++i) {
            const int context = i ? next_value_context(layout, codes[i - 1]) : kFirstValueContext;
            put(1, context, std::min(last, left) - codes[i]);
            if (i && codes[i] == last)
                put(0, id_context(ranks[i - 1]), ranks[i] - ranks[i - 1] - 1);
            else
                put(0, 0, ranks[i]);
            left -= codes[i];
            last = codes[i];
        }
    }
}

}  // namespace logit_codec

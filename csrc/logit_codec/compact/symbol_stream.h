// The numbers of rows, one after another: what is entropy-coded, in which context.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bytes.h"
#include "compact/contexts.h"
#include "compact/quantizer.h"
#include "rows.h"
#include "compact/entropy_model.h"

namespace logit_codec {

// No memory is taken for what a header claims before the size of its stream has borne it out.
// In `compact` a symbol takes at least 1/1470 bits, for the escape has a frequency too.
inline constexpr double kExactEntriesPerByte = 1.0 / 7, kCompactEntriesPerByte = 8 * 1024;
void check_size(uint64_t entries, Bytes stream, double entries_per_byte);

std::vector<uint8_t> write_numbers(const Tables& tables, const CodedRows& rows);

// The first `wanted` of a stream's rows.
CodedRows read_numbers(const Tables& tables, Bytes bytes, size_t rows, size_t entries,
                       size_t wanted);

// Whether an entry's rank is counted from that of the entry before: entries of one value come by
// rank, as their order says next to nothing.  The first is ranked otherwise and stays the first.
inline bool is_tied(uint32_t position, uint32_t value, uint32_t value_before) {
    return position > 1 && value == value_before;
}

// The id of the entry at position i of a row.
template <class Put>
void put_id(uint32_t i, const uint32_t* ranks, const uint32_t* values, Put&& put) {
    if (i == 0)
        put(0, kFirstIdContext, ranks[0]);
    else if (is_tied(i, values[i], values[i - 1]))
        put(0, tied_id_context(ranks[i - 1]), ranks[i] - ranks[i - 1] - 1);
    else
        put(0, new_id_context(place_of(i)), ranks[i]);
}

template <class Put>
void put_top_row(const Grid& grid, uint32_t count_before, uint32_t count, const uint32_t* ranks,
                 const uint32_t* codes, uint32_t tail, Put&& put) {
    put(1, count_context(count_before), count);
    if (count == 0) return;
    uint64_t weights = 0;
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t before = i ? codes[i - 1] : grid.top();
        put(1, i ? next_value_context(place_of(i), grid.kind(before)) : first_value_context(count),
            before - codes[i]);
        put_id(i, ranks, codes, put);
        weights += grid.weight(codes[i]);
    }
    const uint32_t likely = grid.likely_tail(weights);
    put(1, tail_context(grid.kind(likely)), zigzag(tail, likely));
}

template <class Put>
void put_sampled_row(uint32_t draws, uint32_t count, const uint32_t* ranks, const uint32_t* times,
                     Put&& put) {
    if (count == 0) put(1, first_value_context(0), draws);
    uint32_t left = draws;
    for (uint32_t i = 0; i < count; ++i) {
        const uint32_t before = i ? times[i - 1] : draws;
        put(1, i ? next_value_context(place_of(i), draws_kind(before)) : first_value_context(0),
            std::min(before, left) - times[i]);
        put_id(i, ranks, times, put);
        left -= times[i];
    }
}

// Calls put(state, context, number) for every number of the rows in the order of reading.
template <class Put>
void for_each_number(const Layout& layout, const Grid& grid, const CodedRows& rows, Put&& put) {
    size_t entry = 0;
    uint32_t count_before = 0;
    for (size_t row = 0; row < rows.counts.size(); ++row) {
        const uint32_t count = rows.counts[row];
        const uint32_t* ranks = rows.ranks.data() + entry;
        const uint32_t* codes = rows.codes.data() + entry;
        if (layout.draws)
            put_sampled_row(layout.draws, count, ranks, codes, put);
        else
            put_top_row(grid, count_before, count, ranks, codes, rows.tails[row], put);
        count_before = count;
        entry += count;
    }
}

}  // namespace logit_codec

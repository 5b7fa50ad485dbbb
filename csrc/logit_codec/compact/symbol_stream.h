// The symbol stream of a block: the numbers of its rows, one after another, as symbols in contexts
// and raw bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bytes.h"
#include "compact/coded_rows.h"
#include "compact/contexts.h"
#include "compact/entropy_model.h"
#include "compact/quantizer.h"

namespace logit_codec {

std::vector<uint8_t> write_symbol_stream(const EntropyModel& model, const CodedRows& rows);

// The first `wanted` of a stream's rows, which have so many entries in all.  Only a whole stream is
// checked to end where its rows do.
CodedRows read_symbol_stream(const EntropyModel& model, Bytes stream, size_t rows, size_t entries,
                             size_t wanted);

// Whether an entry's ordinal is counted from that of the entry before: entries of one value come by
// ordinal, as their order says next to nothing.  The first has another ordinal and stays the first.
inline bool is_tied(uint32_t position, uint32_t value, uint32_t value_before) {
  return position > 1 && value == value_before;
}

// The id of the entry at position i of a row.
template <class Put>
void put_id(uint32_t i, const uint32_t* ordinals, const uint32_t* values, Put&& put) {
  if (i == 0)
    put(0, kFirstIdContext, ordinals[0]);
  else if (is_tied(i, values[i], values[i - 1]))
    put(0, tied_id_context(ordinals[i - 1]), ordinals[i] - ordinals[i - 1] - 1);
  else
    put(0, new_id_context(place_of(i)), ordinals[i]);
}

template <class Put>
void put_top_row(const Quantizer& quantizer, uint32_t count_before, uint32_t count,
                 const uint32_t* ordinals, const uint32_t* codes, uint32_t tail, Put&& put) {
  put(1, count_context(count_before), count);
  if (count == 0) return;
  uint64_t weights = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t before = i ? codes[i - 1] : quantizer.max_code();
    put(1, i ? next_value_context(place_of(i), quantizer.kind(before)) : first_value_context(count),
        before - codes[i]);
    put_id(i, ordinals, codes, put);
    weights += quantizer.weight(codes[i]);
  }
  const uint32_t likely = quantizer.likely_tail(weights);
  put(1, tail_context(quantizer.kind(likely)), zigzag(tail, likely));
}

template <class Put>
void put_sampled_row(uint32_t draws, uint32_t count, const uint32_t* ordinals,
                     const uint32_t* times, Put&& put) {
  if (count == 0) put(1, first_value_context(0), draws);
  uint32_t left = draws;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t before = i ? times[i - 1] : draws;
    put(1, i ? next_value_context(place_of(i), draws_kind(before)) : first_value_context(0),
        std::min(before, left) - times[i]);
    put_id(i, ordinals, times, put);
    left -= times[i];
  }
}

// Calls put(state, context, number) for every number of the rows in the order of reading.
template <class Put>
void for_each_number(const Layout& layout, const Quantizer& quantizer, const CodedRows& rows,
                     Put&& put) {
  size_t entry = 0;
  uint32_t count_before = 0;
  for (size_t row = 0; row < rows.counts.size(); ++row) {
    const uint32_t count = rows.counts[row];
    const uint32_t* ordinals = rows.ordinals.data() + entry;
    const uint32_t* codes = rows.codes.data() + entry;
    if (layout.draws)
      put_sampled_row(layout.draws, count, ordinals, codes, put);
    else
      put_top_row(quantizer, count_before, count, ordinals, codes, rows.tails[row], put);
    count_before = count;
    entry += count;
  }
}

}  // namespace logit_codec

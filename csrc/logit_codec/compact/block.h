// Rows of a block to bytes and back.
#pragma once

#include <vector>

#include "compact/entropy_model.h"

namespace logit_codec {

// Throws BadRows where a row is not what a store holds: ids in the vocabulary and different from
// each other, log-probabilities finite, at most 0 and falling, draws that sum up.
void check_rows(const Layout& layout, const Rows& rows);

// `exact`: counts, ids of three bytes, float32 log-probabilities.
std::vector<uint8_t> encode_exact(const Rows& rows);

// Writes ids and log-probabilities of a block that has `entries` of them, and its rows' counts.
void decode_exact(Bytes bytes, const Layout& layout, Span<int32_t> counts,
                  Span<int32_t> ids, Span<float> logprobs);

// `compact`.  rank_of_id: of the tables' ranks.
std::vector<uint8_t> encode_compact(const Tables& tables, const RankOfId& rank_of_id,
                                    const Rows& rows);
// Decodes the first counts.size() of a stream's `rows` rows; ids and logprobs have room for all its
// entries.  Only a whole stream is checked to end where its rows do.
void decode_compact(const Tables& tables, Bytes bytes, size_t rows, Span<int32_t> counts,
                    Span<int32_t> ids, Span<float> logprobs);

// The stream of `row_count` of the rows of a `compact` stream, bit-exact in what it decodes to.
std::vector<uint8_t> slice_compact(const Tables& tables, Bytes bytes, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count);

CodedRows code_rows(const Layout& layout, const Grid& grid, const Ranks& ranks,
                    const RankOfId& rank_of_id, const Rows& rows);

}  // namespace logit_codec

// Rows as the whole numbers that are entropy-coded, and back.
#pragma once

#include <cstdint>
#include <vector>

#include "compact/quantizer.h"
#include "compact/vocabulary_order.h"
#include "rows.h"

namespace logit_codec {

// Ordinals instead of ids, and the quantizer's codes (top rows) or draws (sampled rows) instead of
// log-probabilities.
struct CodedRows {
  std::vector<uint32_t> counts, tails;    // of each row; sampled rows and empty ones have no tail
  std::vector<uint32_t> ordinals, codes;  // of each entry
};

CodedRows code_rows(const Layout& layout, const Quantizer& quantizer, const VocabularyOrder& order,
                    const OrdinalOfId& ordinal_of_id, const Rows& rows);

RowBuffers decode_rows(const Layout& layout, const Quantizer& quantizer,
                       const VocabularyOrder& order, const CodedRows& coded);

}  // namespace logit_codec

#include "compact/coded_rows.h"

#include <algorithm>
#include <cmath>

namespace logit_codec {
namespace {

// Entries of one value come by ordinal: their order says nothing, and sorted ordinals need fewer
// bits.
void sort_ties(std::span<uint32_t> ordinals, const uint32_t* codes) {
  for (size_t begin = 0, end; begin < ordinals.size(); begin = end) {
    for (end = begin + 1; end < ordinals.size() && codes[end] == codes[begin];) ++end;
    std::sort(ordinals.begin() + begin, ordinals.begin() + end);
  }
}

// out[i]: the ordinal of ids[i], but for the order of ties.
void order_row(const Layout& layout, const VocabularyOrder& order, const OrdinalOfId& ordinal_of_id,
               std::span<const int32_t> ids, const uint32_t* codes, std::span<uint32_t> out) {
  if (ids.empty()) return;
  for (size_t i = 0; i < ids.size(); ++i) out[i] = ordinal_of_id.first(uint32_t(ids[i]));
  if (layout.draws) {  // none of the most drawn is the first by itself
    size_t tied = 1;
    while (tied < out.size() && codes[tied] == codes[0]) ++tied;
    std::swap(out[0], *std::min_element(out.begin(), out.begin() + tied));
  }
  const uint32_t of_class = order.class_of(out[0]);
  for (size_t i = 1; i < out.size(); ++i) out[i] = ordinal_of_id.in_class(of_class, out[i]);
  sort_ties(out.subspan(1), codes + 1);
}

void id_row(const VocabularyOrder& order, std::span<const uint32_t> ordinals, int32_t* ids) {
  if (ordinals.empty()) return;
  const uint32_t of_class = order.class_of(ordinals[0]);
  ids[0] = int32_t(order.first_id(ordinals[0]));
  for (size_t i = 1; i < ordinals.size(); ++i) ids[i] = int32_t(order.id(of_class, ordinals[i]));
}

}  // namespace

CodedRows code_rows(const Layout& layout, const Quantizer& quantizer, const VocabularyOrder& order,
                    const OrdinalOfId& ordinal_of_id, const Rows& rows) {
  CodedRows coded;
  coded.counts.assign(rows.counts.begin(), rows.counts.end());
  coded.tails.resize(rows.counts.size());
  coded.ordinals.resize(rows.ids.size());
  coded.codes.resize(rows.ids.size());
  size_t entry = 0;
  for (size_t row = 0; row < rows.counts.size(); ++row) {
    const size_t count = coded.counts[row];
    const std::span<const float> logprobs = rows.logprobs.subspan(entry, count);
    uint32_t* codes = coded.codes.data() + entry;
    if (layout.draws)
      for (size_t i = 0; i < count; ++i) codes[i] = draws_of(layout, logprobs[i]);
    else
      coded.tails[row] = quantizer.encode(logprobs, codes);
    order_row(layout, order, ordinal_of_id, rows.ids.subspan(entry, count), codes,
              {coded.ordinals.data() + entry, count});
    entry += count;
  }
  return coded;
}

RowBuffers decode_rows(const Layout& layout, const Quantizer& quantizer,
                       const VocabularyOrder& order, const CodedRows& coded) {
  RowBuffers rows;
  rows.counts.assign(coded.counts.begin(), coded.counts.end());
  rows.ids.resize(coded.ordinals.size());
  rows.logprobs.resize(coded.codes.size());
  const uint32_t draws = layout.draws;
  std::vector<float> log_share(draws + 1);
  for (uint32_t n = 1; n <= draws; ++n) log_share[n] = float(std::log(double(n) / draws));
  size_t entry = 0;
  for (size_t row = 0; row < coded.counts.size(); ++row) {
    const size_t count = coded.counts[row];
    const std::span<const uint32_t> codes(coded.codes.data() + entry, count);
    id_row(order, {coded.ordinals.data() + entry, count}, rows.ids.data() + entry);
    float* logprobs = rows.logprobs.data() + entry;
    if (draws)
      for (size_t i = 0; i < count; ++i) logprobs[i] = log_share[codes[i]];
    else
      quantizer.decode(codes, coded.tails[row], logprobs);
    entry += count;
  }
  return rows;
}

}  // namespace logit_codec

#include "rows.h"

#include <algorithm>

#include "bytes.h"

namespace logit_codec {
namespace {

constexpr float kRounding = 1e-3f;  // a teacher's own rounding may bring a probability above 1

// sorted: room for the row's ids.
void check_row(const Layout& layout, std::span<const int32_t> ids, std::span<const float> logprobs,
               std::vector<int32_t>& sorted) {
  uint64_t draws = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || uint32_t(ids[i]) >= layout.vocab_size)
      refuse<BadRows>("id ", ids[i], " is not in the vocabulary of ", layout.vocab_size);
    if (!std::isfinite(logprobs[i]) || logprobs[i] > kRounding)
      refuse<BadRows>("log-probability ", logprobs[i], " is not finite and at most 0");
    if (i && logprobs[i] > logprobs[i - 1])
      refuse<BadRows>("entry ", i, " has log-probability ", logprobs[i], " after ", logprobs[i - 1],
                      "; entries come by falling log-probability");
    if (layout.draws && draws_of(layout, logprobs[i]) == 0)
      refuse<BadRows>("entry ", i, " of a sampled row has log-probability ", logprobs[i],
                      ", which is less than one of ", layout.draws, " draws");
    draws += draws_of(layout, logprobs[i]);
  }
  if (layout.draws && !ids.empty() && draws != layout.draws)
    refuse<BadRows>("the draws sum to ", draws, ", not to ", layout.draws);
  sorted.assign(ids.begin(), ids.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse<BadRows>("id ", *twice, " comes twice");
}

}  // namespace

void check_rows(const Layout& layout, const Rows& rows) {
  std::vector<int32_t> sorted;
  size_t entry = 0;
  for (size_t row = 0; row < rows.counts.size(); ++row) {
    const auto count = size_t(rows.counts[row]);
    try {
      check_row(layout, rows.ids.subspan(entry, count), rows.logprobs.subspan(entry, count),
                sorted);
    } catch (const BadRows& error) {
      refuse<BadRows>("row ", row, ": ", error.what());
    }
    entry += count;
  }
}

}  // namespace logit_codec

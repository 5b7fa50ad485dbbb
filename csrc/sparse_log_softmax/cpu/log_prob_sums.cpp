// What entropy and standard deviation of a row's distribution are made of.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "row_loops.h"

namespace megatron_pd {
namespace {

template <class Logit>
void sum_rows(const at::Tensor& logits, const at::Tensor& lse, const Shard& shard,
              at::Tensor& sums_T3) {
  using Number = typename RowLoops<Logit>::Accumulator;
  const RowLayout layout = row_layout(logits);
  const auto* data = logits.const_data_ptr<Logit>();
  const auto* lse_data = lse.const_data_ptr<Number>();
  auto* sums = sums_T3.mutable_data_ptr<double>();
  at::parallel_for(0, sums_T3.size(0), grain(shard.size), [&](int64_t begin, int64_t end) {
    const RowLoops<Logit> loops;
    for (int64_t row = begin; row < end; ++row)
      loops.log_prob_sums(data + layout.offset(row), shard.live, lse_data[row], sums + 3 * row);
  });
}

at::Tensor log_prob_sums(const at::Tensor& logits, const at::Tensor& lse, int64_t first_id,
                         int64_t vocab_size) {
  check_logits(logits);
  const int64_t rows = logits.size(0) * logits.size(1);
  check_row_tensor(logits, lse, "lse", {rows});
  at::Tensor sums = at::empty({rows, 3}, logits.options().dtype(at::kDouble));
  const Shard shard = shard_of(logits, first_id, vocab_size);
  for_logit_type(logits.scalar_type(),
                 [&](auto logit) { sum_rows<decltype(logit)>(logits, lse, shard, sums); });
  return sums;
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CPU, library) {
  library.impl("log_prob_sums", &megatron_pd::log_prob_sums);
}

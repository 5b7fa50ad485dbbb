// The top k logits of each row.
//
// A row is read once for the largest logit of each of its groups. The k-th of these maxima is no
// larger than the k-th logit, since k logits reach it; and with a few groups for each of the k,
// hardly more than k do. So what is read again, and sorted, are the groups that reach it.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <functional>
#include <tuple>

#include "row_loops.h"

namespace megatron_pd {
namespace {

constexpr int64_t kGroupsPerEntry = 4;

// Largest first; of equals the lower column.
template <class Number>
bool is_before(const Candidate<Number>& a, const Candidate<Number>& b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column);
}

template <class Logit>
class TopK {
 public:
  using Number = typename RowLoops<Logit>::Accumulator;

  TopK(int64_t count, int64_t k)
      : count_(count),
        k_(k),
        group_(std::max(kGroupUnit, count / (kGroupsPerEntry * k) / kGroupUnit * kGroupUnit)),
        maxima_((count + group_ - 1) / group_),
        candidates_(count) {}

  void operator()(const Logit* z, int64_t first_id, Number* values, int32_t* ids) {
    const int64_t found = find(z);
    const int64_t kept = std::min(k_, found);
    const auto begin = candidates_.begin();
    if (kept < found) std::nth_element(begin, begin + kept, begin + found, is_before<Number>);
    std::sort(begin, begin + kept, is_before<Number>);
    for (int64_t j = 0; j < k_; ++j) {
      values[j] = j < kept ? candidates_[j].value : -std::numeric_limits<Number>::infinity();
      ids[j] = j < kept ? static_cast<int32_t>(first_id + candidates_[j].column) : -1;
    }
  }

 private:
  // How many candidates there are: the top k are among them.
  int64_t find(const Logit* z) {
    loops_.maxima(z, count_, group_, maxima_.data());
    const Number threshold = bound();
    int64_t found = 0;
    for (size_t g = 0; g < maxima_.size(); ++g) {
      if (!(maxima_[g] >= threshold)) continue;
      const int64_t begin = static_cast<int64_t>(g) * group_;
      found += loops_.candidates(z, begin, std::min(begin + group_, count_), threshold,
                                 candidates_.data() + found);
    }
    return found;
  }

  // No larger than the k-th logit. −∞ is no candidate: such a token cannot be.
  Number bound() {
    const Number least = std::numeric_limits<Number>::lowest();
    if (static_cast<int64_t>(maxima_.size()) < k_) return least;
    ordered_ = maxima_;
    std::nth_element(ordered_.begin(), ordered_.begin() + (k_ - 1), ordered_.end(),
                     std::greater<Number>());
    return std::max(least, ordered_[k_ - 1]);
  }

  int64_t count_, k_, group_;
  RowLoops<Logit> loops_;
  std::vector<Number> maxima_, ordered_;
  std::vector<Candidate<Number>> candidates_;
};

template <class Logit>
void top_k_rows(const at::Tensor& logits, const Shard& shard, at::Tensor& values_TK,
                at::Tensor& ids_TK) {
  using Number = typename RowLoops<Logit>::Accumulator;
  const RowLayout layout = row_layout(logits);
  const int64_t k = values_TK.size(1);
  const auto* data = logits.const_data_ptr<Logit>();
  auto* values = values_TK.mutable_data_ptr<Number>();
  auto* ids = ids_TK.mutable_data_ptr<int32_t>();
  at::parallel_for(0, values_TK.size(0), grain(shard.size), [&](int64_t begin, int64_t end) {
    TopK<Logit> top_k(shard.live, k);
    for (int64_t row = begin; row < end; ++row)
      top_k(data + layout.offset(row), shard.first_id, values + row * k, ids + row * k);
  });
}

std::tuple<at::Tensor, at::Tensor> top_k(const at::Tensor& logits, int64_t k, int64_t first_id,
                                         int64_t vocab_size) {
  check_logits(logits);
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1; got ", k, ".");
  const int64_t rows = logits.size(0) * logits.size(1);
  at::Tensor values = at::empty({rows, k}, logits.options().dtype(accumulation_type(logits)));
  at::Tensor ids = at::empty({rows, k}, logits.options().dtype(at::kInt));
  const Shard shard = shard_of(logits, first_id, vocab_size);
  for_logit_type(logits.scalar_type(),
                 [&](auto logit) { top_k_rows<decltype(logit)>(logits, shard, values, ids); });
  return {values, ids};
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CPU, library) { library.impl("top_k", &megatron_pd::top_k); }

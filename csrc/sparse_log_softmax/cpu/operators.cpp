// The operators on the CPU: rows are shared out over threads, a row's two loops are in rows_impl.h.
//
// Passes over memory: forward reads the logits once; backward reads and writes them once, or writes
// the gradient elsewhere. Besides those there are only [T], [T, K] and [T, 1+K] tensors.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "row_loops.h"
#include "slot_map.h"

namespace megatron_pd {
namespace {

// The temperatures of a row.
template <class Number>
const Number* of_row(const at::Tensor& temperatures, int64_t row) {
  const int64_t index = temperatures.size(0) == 1 ? 0 : row;
  return temperatures.const_data_ptr<Number>() + index * temperatures.size(1);
}

template <class Logit>
void forward_rows(const at::Tensor& logits, const at::Tensor& ids_TK,
                  const at::Tensor& temperatures, const Shard& shard, at::Tensor& max_T,
                  at::Tensor& sums_T) {
  using Accumulator = typename RowLoops<Logit>::Accumulator;
  const RowLoops<Logit> loops;
  const RowLayout layout = row_layout(logits);
  const Ids ids = ids_of(ids_TK);
  const int64_t each = temperatures.size(1);
  const auto* data = logits.const_data_ptr<Logit>();
  auto* max = max_T.mutable_data_ptr<Accumulator>();
  auto* sums = sums_T.mutable_data_ptr<Accumulator>();

  at::parallel_for(0, ids_TK.size(0), grain(shard.size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Logit* z = data + layout.offset(row);
      Accumulator* out = sums + row * (each + ids.count);
      const auto* row_temperatures = of_row<Accumulator>(temperatures, row);
      for (int64_t n = 0; n < each; ++n)
        TORCH_CHECK_VALUE(row_temperatures[n] > 0, "temperature must be positive; got ",
                          row_temperatures[n], ".");
      double exact[kMostTemperatures];
      loops.statistics(z, shard.live, row_temperatures, each, max + row, exact);
      for (int64_t n = 0; n < each; ++n) out[n] = static_cast<Accumulator>(exact[n]);
      for (int64_t j = 0; j < ids.count; ++j) {
        const int64_t id = ids.at(row, j);
        TORCH_CHECK_INDEX(id == kPaddingId || shard.is_known(id), "ids[", row, ", ", j, "] is ", id,
                          ": expected -1 (padding) or a vocabulary id from 0 to ",
                          shard.vocab_size - 1, ".");
        const int64_t column = id == kPaddingId ? -1 : shard.place(id);
        out[each + j] = column < 0 ? Accumulator(0) : static_cast<Accumulator>(z[column]);
      }
    }
  });
}

// One row's gradient: at each temperature g·(1[v = id] summed over the ids − Σg·softmax), with Σg
// less the gradient of lse.
template <class Logit>
class GradientOfRow {
 public:
  using Accumulator = typename RowLoops<Logit>::Accumulator;

  GradientOfRow(const Shard& shard, const Ids& ids, int64_t each)
      : shard_(shard), ids_(ids), each_(each), slots_(ids.count), totals_(ids.count) {}

  // All but `row` are the row's own; `z` and `out` may be the same memory.
  void operator()(const Logit* z, Logit* out, int64_t row, const Accumulator* temperatures,
                  Accumulator max, const Accumulator* sums, const Accumulator* grad_logq,
                  const Accumulator* grad_lse) {
    DenseTerm<Accumulator> terms[kMostTemperatures];
    // A row without gradient (a masked token) isn't even read, so that what it holds can't matter.
    bool dense = false;
    for (int64_t n = 0; n < each_; ++n) {
      const double mass = mass_of(row, grad_logq + n * ids_.count) - grad_lse[n];
      const double divisor = static_cast<double>(sums[n]) * temperatures[n];
      terms[n] = {temperatures[n], static_cast<Accumulator>(mass == 0.0 ? 0.0 : mass / divisor)};
      dense |= mass != 0.0;
    }
    const int64_t live = shard_.live;
    if (dense) loops_.gradient(z, out, live, max, terms, each_);
    std::fill(out + (dense ? live : 0), out + shard_.size, Logit(0));
    add_chosen(out, row, max, terms, sums + each_, grad_logq);
  }

 private:
  // An id may stand in several columns (the label is often a teacher's token too): its gradients
  // are added in column order before the one rounding to the logits' type.
  void add_chosen(Logit* out, int64_t row, Accumulator max, const DenseTerm<Accumulator>* terms,
                  const Accumulator* chosen, const Accumulator* grad_logq) {
    slots_.clear();
    for (int64_t j = 0; j < ids_.count; ++j) {
      const int64_t id = ids_.at(row, j);
      const int64_t column = id == kPaddingId ? -1 : shard_.place(id);
      if (column < 0) continue;
      const auto [slot, is_new] = slots_.find_or_add(column);
      if (is_new) totals_[slot] = {column, dense_at(chosen[j], max, terms)};
      for (int64_t n = 0; n < each_; ++n)
        totals_[slot].value += grad_logq[n * ids_.count + j] / terms[n].temperature;
    }
    for (int64_t slot = 0; slot < slots_.size(); ++slot)
      out[totals_[slot].column] = static_cast<Logit>(totals_[slot].value);
  }

  double mass_of(int64_t row, const Accumulator* grad_logq) const {
    double mass = 0.0;
    for (int64_t j = 0; j < ids_.count; ++j) {
      if (ids_.at(row, j) != kPaddingId) mass += grad_logq[j];
    }
    return mass;
  }

  Accumulator dense_at(Accumulator z, Accumulator max, const DenseTerm<Accumulator>* terms) const {
    Accumulator dense = 0;
    for (int64_t n = 0; n < each_; ++n) {
      if (terms[n].coefficient != 0)
        dense -= terms[n].coefficient * std::exp((z - max) / terms[n].temperature);
    }
    return dense;
  }

  struct Total {
    int64_t column;
    Accumulator value;
  };

  Shard shard_;
  Ids ids_;
  int64_t each_;  // temperatures
  RowLoops<Logit> loops_;
  SlotMap slots_;
  std::vector<Total> totals_;
};

struct BackwardInputs {
  const at::Tensor &ids, &temperatures, &max, &sums, &grad_logq, &grad_lse;
};

template <class Logit>
void backward_rows(const at::Tensor& logits, const at::Tensor& gradient, const BackwardInputs& in,
                   const Shard& shard) {
  using Accumulator = typename RowLoops<Logit>::Accumulator;
  const RowLayout layout = row_layout(logits), out_layout = row_layout(gradient);
  const Ids ids = ids_of(in.ids);
  const auto* z = logits.const_data_ptr<Logit>();
  auto* out = gradient.mutable_data_ptr<Logit>();
  const int64_t each = in.temperatures.size(1);
  const auto* max = in.max.const_data_ptr<Accumulator>();
  const auto* sums = in.sums.const_data_ptr<Accumulator>();
  const auto* grad_logq = in.grad_logq.const_data_ptr<Accumulator>();
  const auto* grad_lse = in.grad_lse.const_data_ptr<Accumulator>();

  at::parallel_for(0, in.ids.size(0), grain(shard.size), [&](int64_t begin, int64_t end) {
    GradientOfRow<Logit> gradient_of_row(shard, ids, each);
    for (int64_t row = begin; row < end; ++row) {
      gradient_of_row(z + layout.offset(row), out + out_layout.offset(row), row,
                      of_row<Accumulator>(in.temperatures, row), max[row],
                      sums + row * (each + ids.count), grad_logq + row * each * ids.count,
                      grad_lse + row * each);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& logits, const at::Tensor& ids,
                                           const at::Tensor& temperatures, int64_t first_id,
                                           int64_t vocab_size) {
  check_logits_and_ids(logits, ids, temperatures);
  const auto options = logits.options().dtype(accumulation_type(logits));
  at::Tensor max = at::empty({ids.size(0)}, options);
  at::Tensor sums = at::empty({ids.size(0), temperatures.size(1) + ids.size(1)}, options);
  const Shard shard = shard_of(logits, first_id, vocab_size);
  for_logit_type(logits.scalar_type(), [&](auto logit) {
    forward_rows<decltype(logit)>(logits, ids, temperatures, shard, max, sums);
  });
  return {max, sums};
}

void backward_into(const at::Tensor& logits, const at::Tensor& gradient, const BackwardInputs& in,
                   int64_t first_id, int64_t vocab_size) {
  check_logits_and_ids(logits, in.ids, in.temperatures);
  check_row_tensors(logits, in.ids, in.temperatures, in.max, in.sums, in.grad_logq, in.grad_lse);
  const Shard shard = shard_of(logits, first_id, vocab_size);
  for_logit_type(logits.scalar_type(),
                 [&](auto logit) { backward_rows<decltype(logit)>(logits, gradient, in, shard); });
}

at::Tensor backward(const at::Tensor& logits, const at::Tensor& ids, const at::Tensor& temperatures,
                    const at::Tensor& max, const at::Tensor& sums, const at::Tensor& grad_logq,
                    const at::Tensor& grad_lse, int64_t first_id, int64_t vocab_size) {
  at::Tensor gradient = at::empty(logits.sizes(), logits.options());
  backward_into(logits, gradient, {ids, temperatures, max, sums, grad_logq, grad_lse}, first_id,
                vocab_size);
  return gradient;
}

void backward_(const at::Tensor& logits, const at::Tensor& ids, const at::Tensor& temperatures,
               const at::Tensor& max, const at::Tensor& sums, const at::Tensor& grad_logq,
               const at::Tensor& grad_lse, int64_t first_id, int64_t vocab_size) {
  backward_into(logits, logits, {ids, temperatures, max, sums, grad_logq, grad_lse}, first_id,
                vocab_size);
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CPU, library) {
  library.impl("sparse_log_softmax_forward", &megatron_pd::forward);
  library.impl("sparse_log_softmax_backward", &megatron_pd::backward);
  library.impl("sparse_log_softmax_backward_", &megatron_pd::backward_);
}

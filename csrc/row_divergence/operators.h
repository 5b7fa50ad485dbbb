// Checks and conversions between tensors and row.h, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>

#include "row.h"

namespace megatron_pd {

template <class Choice>
Choice choice(const char* what, c10::string_view name,
              std::initializer_list<std::pair<const char*, Choice>> choices) {
  for (const auto& [known, value] : choices) {
    if (name == known) return value;
  }
  std::string known_names;
  for (const auto& [known, value] : choices)
    known_names += (known_names.empty() ? "" : ", ") + std::string(known);
  TORCH_CHECK_VALUE(false, "Unknown ", what, " '", name, "'. The fused kernel supports ",
                    known_names, ".");
}

template <class Number>
Divergence<Number> divergence_named(c10::string_view tail, c10::string_view loss,
                                    c10::string_view weight, double beta) {
  return {choice<Tail>("tail policy", tail,
                       {{"renormalize", Tail::kRenormalize},
                        {"raw", Tail::kRaw},
                        {"ghost", Tail::kGhost},
                        {"to-label", Tail::kToLabel},
                        {"decoupled", Tail::kDecoupled},
                        {"sampled", Tail::kSampled}}),
          choice<Loss>("loss", loss,
                       {{"nll", Loss::kNll},
                        {"kld", Loss::kKld},
                        {"reverse-kld", Loss::kReverseKld},
                        {"jsd", Loss::kJsd},
                        {"mse-prob", Loss::kMseProb}}),
          choice<Weight>("weight", weight,
                         {{"one", Weight::kOne},
                          {"tau-squared", Weight::kTauSquared},
                          {"tempered-mass", Weight::kTemperedMass}}),
          static_cast<Number>(beta)};
}

struct RowTensors {
  const at::Tensor &log_q, &label_log_q, &ids, &log_t, &counts, &labels, &temperature;

  void check() const {
    TORCH_CHECK_TYPE(log_q.scalar_type() == at::kFloat || log_q.scalar_type() == at::kDouble,
                     "log_q must be float32 or float64; got ", log_q.scalar_type(), ".");
    TORCH_CHECK_VALUE(log_q.dim() == 2 && (log_q.size(1) <= 1 || log_q.stride(1) == 1),
                      "log_q must be [T, K] with a last stride of 1; got ", log_q.sizes(),
                      " with strides ", log_q.strides(), ".");
    const int64_t rows = log_q.size(0), columns = log_q.size(1);
    const auto expect = [&](const at::Tensor& tensor, const char* name, at::ScalarType type,
                            at::IntArrayRef sizes) {
      TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_contiguous() &&
                            tensor.scalar_type() == type && tensor.device() == log_q.device(),
                        name, " must be a contiguous ", type, " tensor of shape ", sizes, " on ",
                        log_q.device(), "; got ", tensor.scalar_type(), " ", tensor.sizes(), " on ",
                        tensor.device(), ".");
    };
    expect(label_log_q, "label_log_q", log_q.scalar_type(), {rows});
    expect(ids, "ids", at::kInt, {rows, columns});
    expect(log_t, "log_t", log_q.scalar_type(), {rows, columns});
    expect(counts, "counts", at::kInt, {rows});
    expect(labels, "labels", at::kLong, {rows});
    expect(temperature, "temperature", log_q.scalar_type(), {rows});
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> outputs() const {
    const auto options = log_q.options();
    return {at::empty({log_q.size(0)}, options), at::empty(log_q.sizes(), options),
            at::empty({log_q.size(0)}, options)};
  }
};

// All rows of one call, in plain pointers.
template <class Number>
RowProblem<Number> problem_of(const RowTensors& in,
                              const std::tuple<at::Tensor, at::Tensor, at::Tensor>& out) {
  const auto& [loss, grad_log_q, grad_label_log_q] = out;
  return {in.log_q.const_data_ptr<Number>(),
          in.log_q.stride(0),
          in.label_log_q.const_data_ptr<Number>(),
          in.ids.const_data_ptr<int32_t>(),
          in.log_t.const_data_ptr<Number>(),
          in.counts.const_data_ptr<int32_t>(),
          in.labels.const_data_ptr<int64_t>(),
          in.temperature.const_data_ptr<Number>(),
          in.log_q.size(0),
          in.log_q.size(1),
          loss.mutable_data_ptr<Number>(),
          grad_log_q.mutable_data_ptr<Number>(),
          grad_label_log_q.mutable_data_ptr<Number>()};
}

}  // namespace megatron_pd

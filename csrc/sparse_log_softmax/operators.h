// Checks and conversions between tensors and `problem.h`, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "problem.h"

namespace megatron_pd {

inline RowLayout row_layout(const at::Tensor& logits) {
  return {logits.size(1), logits.stride(0), logits.stride(1)};
}

inline Ids ids_of(const at::Tensor& ids) {
  return {ids.const_data_ptr(), ids.scalar_type() == at::kLong, ids.size(1)};
}

inline Shard shard_of(const at::Tensor& logits, int64_t first_id, int64_t vocab_size) {
  const int64_t size = logits.size(2);
  const int64_t live = std::max<int64_t>(0, std::min(size, vocab_size - first_id));
  return {first_id, size, live, vocab_size};
}

// float64 logits are summed in float64, all others in float32.
inline at::ScalarType accumulation_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_logits(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 3, "logits must be [outer, inner, V]; got ", logits.dim(),
                    " dimensions.");
  TORCH_CHECK_VALUE(logits.size(2) <= 1 || logits.stride(2) == 1,
                    "The last dimension of the logits must have stride 1; got ", logits.stride(2),
                    ".");
}

inline void check_logits_and_ids(const at::Tensor& logits, const at::Tensor& ids,
                                 const at::Tensor& temperatures) {
  check_logits(logits);
  const int64_t rows = logits.size(0) * logits.size(1);
  TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(0) == rows && ids.is_contiguous(), "ids must be [",
                    rows, ", K] and contiguous; got ", ids.sizes(), ".");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
                   "ids must be int32 or int64; got ", ids.scalar_type(), ".");
  TORCH_CHECK_VALUE(temperatures.dim() == 2 &&
                        (temperatures.size(0) == 1 || temperatures.size(0) == rows) &&
                        temperatures.size(1) >= 1 && temperatures.size(1) <= kMostTemperatures &&
                        temperatures.is_contiguous(),
                    "temperatures must be [1, N] or [", rows, ", N] with N from 1 to ",
                    kMostTemperatures, " and contiguous; got ", temperatures.sizes(), ".");
  TORCH_CHECK_TYPE(temperatures.scalar_type() == accumulation_type(logits), "temperatures must be ",
                   accumulation_type(logits), " for ", logits.scalar_type(), " logits; got ",
                   temperatures.scalar_type(), ".");
  TORCH_CHECK_VALUE(ids.device() == logits.device() && temperatures.device() == logits.device(),
                    "logits, ids and temperatures must be on one device; got ", logits.device(),
                    ", ", ids.device(), " and ", temperatures.device(), ".");
}

inline void check_row_tensor(const at::Tensor& logits, const at::Tensor& tensor, const char* name,
                             at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_contiguous() &&
                        tensor.scalar_type() == accumulation_type(logits) &&
                        tensor.device() == logits.device(),
                    name, " must be a contiguous ", accumulation_type(logits), " tensor of shape ",
                    sizes, " on ", logits.device(), "; got ", tensor.scalar_type(), " ",
                    tensor.sizes(), " on ", tensor.device(), ".");
}

// What the backward operators take besides: the row statistics and the gradients of the outputs.
inline void check_row_tensors(const at::Tensor& logits, const at::Tensor& ids,
                              const at::Tensor& temperatures, const at::Tensor& max,
                              const at::Tensor& sums, const at::Tensor& grad_logq,
                              const at::Tensor& grad_lse) {
  const int64_t rows = ids.size(0), count = ids.size(1), each = temperatures.size(1);
  check_row_tensor(logits, max, "max", {rows});
  check_row_tensor(logits, sums, "sums", {rows, each + count});
  check_row_tensor(logits, grad_logq, "grad_logq", {rows, each, count});
  check_row_tensor(logits, grad_lse, "grad_lse", {rows, each});
}

}  // namespace megatron_pd

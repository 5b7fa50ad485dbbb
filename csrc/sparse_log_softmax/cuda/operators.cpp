// The operators on CUDA: checks, outputs and the launch on torch's current stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#define MEGATRON_PD_CUDA_STREAM cudaStream_t
#include "launch.h"
#include "../operators.h"

namespace megatron_pd {
namespace {

LogitType logit_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return LogitType::kFloat32;
    case at::kBFloat16:
      return LogitType::kBFloat16;
    case at::kHalf:
      return LogitType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "On CUDA the logits must be float32, bfloat16 or float16; got ", type,
                       ". float64 is for checking gradients, on the CPU.");
  }
}

Temperatures temperatures_of(const at::Tensor& temperatures) {
  return {temperatures.const_data_ptr<float>(), temperatures.size(0) > 1, temperatures.size(1)};
}

// Blocks of a grid's first dimension, which is one block per row.
void check_rows(int64_t rows) {
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max(), "At most ",
                    std::numeric_limits<int32_t>::max(), " rows fit one launch; got ", rows, ".");
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& logits, const at::Tensor& ids,
                                           const at::Tensor& temperatures, int64_t first_id,
                                           int64_t vocab_size) {
  const LogitType type = logit_type(logits.scalar_type());
  check_logits_and_ids(logits, ids, temperatures);
  const int64_t rows = ids.size(0);
  check_rows(rows);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(at::kFloat);
  at::Tensor max = at::empty({rows}, options);
  at::Tensor sums = at::empty({rows, temperatures.size(1) + ids.size(1)}, options);
  if (rows > 0) {
    const int64_t parts = parts_of_a_row(type, rows, logits.size(2));
    const at::Tensor partial = at::empty({rows, parts, 1 + temperatures.size(1)}, options);
    launch_forward(type,
                   {logits.const_data_ptr(), row_layout(logits), ids_of(ids),
                    shard_of(logits, first_id, vocab_size), temperatures_of(temperatures), parts,
                    partial.mutable_data_ptr<float>(), max.mutable_data_ptr<float>(),
                    sums.mutable_data_ptr<float>()},
                   rows, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {max, sums};
}

void backward_into(const at::Tensor& logits, const at::Tensor& gradient, const at::Tensor& ids,
                   const at::Tensor& temperatures, const at::Tensor& max, const at::Tensor& sums,
                   const at::Tensor& grad_logq, const at::Tensor& grad_lse, int64_t first_id,
                   int64_t vocab_size) {
  const LogitType type = logit_type(logits.scalar_type());
  check_logits_and_ids(logits, ids, temperatures);
  check_row_tensors(logits, ids, temperatures, max, sums, grad_logq, grad_lse);
  const int64_t rows = ids.size(0);
  check_rows(rows);
  if (rows == 0) return;
  const c10::cuda::CUDAGuard guard(logits.device());
  launch_backward(type,
                  {logits.const_data_ptr(), row_layout(logits), gradient.mutable_data_ptr(),
                   row_layout(gradient), ids_of(ids), shard_of(logits, first_id, vocab_size),
                   temperatures_of(temperatures), parts_of_a_row(type, rows, logits.size(2)),
                   max.const_data_ptr<float>(), sums.const_data_ptr<float>(),
                   grad_logq.const_data_ptr<float>(), grad_lse.const_data_ptr<float>()},
                  rows, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor backward(const at::Tensor& logits, const at::Tensor& ids, const at::Tensor& temperatures,
                    const at::Tensor& max, const at::Tensor& sums, const at::Tensor& grad_logq,
                    const at::Tensor& grad_lse, int64_t first_id, int64_t vocab_size) {
  at::Tensor gradient = at::empty(logits.sizes(), logits.options());
  backward_into(logits, gradient, ids, temperatures, max, sums, grad_logq, grad_lse, first_id,
                vocab_size);
  return gradient;
}

void backward_(const at::Tensor& logits, const at::Tensor& ids, const at::Tensor& temperatures,
               const at::Tensor& max, const at::Tensor& sums, const at::Tensor& grad_logq,
               const at::Tensor& grad_lse, int64_t first_id, int64_t vocab_size) {
  backward_into(logits, logits, ids, temperatures, max, sums, grad_logq, grad_lse, first_id,
                vocab_size);
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CUDA, library) {
  library.impl("sparse_log_softmax_forward", &megatron_pd::forward);
  library.impl("sparse_log_softmax_backward", &megatron_pd::backward);
  library.impl("sparse_log_softmax_backward_", &megatron_pd::backward_);
}

// The operator on CUDA: checks, outputs and the launch on torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../operators.h"
#include "launch.h"

namespace megatron_pd {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_divergence(
    const at::Tensor& log_q, const at::Tensor& label_log_q, const at::Tensor& ids,
    const at::Tensor& log_t, const at::Tensor& counts, const at::Tensor& labels,
    const at::Tensor& temperature, c10::string_view tail, c10::string_view loss,
    c10::string_view weight, double beta) {
  const RowTensors in{log_q, label_log_q, ids, log_t, counts, labels, temperature};
  in.check();
  TORCH_CHECK_TYPE(log_q.scalar_type() == at::kFloat,
                   "On CUDA log_q must be float32. float64 is for checking gradients, on the CPU.");
  TORCH_CHECK_VALUE(log_q.size(0) <= std::numeric_limits<int32_t>::max(), "At most ",
                    std::numeric_limits<int32_t>::max(), " rows fit one launch; got ",
                    log_q.size(0), ".");
  const c10::cuda::CUDAGuard guard(log_q.device());
  const auto out = in.outputs();
  if (log_q.size(0) > 0) {
    launch_row_divergence(divergence_named<float>(tail, loss, weight, beta),
                          problem_of<float>(in, out), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CUDA, library) {
  library.impl("row_divergence", &megatron_pd::row_divergence);
}

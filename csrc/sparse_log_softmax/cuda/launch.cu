// Compiles the kernels for the GPU and starts them.
#include <cuda_runtime_api.h>

#define MEGATRON_PD_CUDA_STREAM cudaStream_t
#include "kernels.cuh"

namespace megatron_pd {
namespace {

// Two blocks of 512 on a multiprocessor have 1024 · kBatch · 16 B = 64 KB of loads under way.
constexpr int kThreads = 512;

template <class Launch>
void for_logit_type(LogitType type, const Launch& launch) {
  switch (type) {
    case LogitType::kFloat32:
      return launch(Float32Logit());
    case LogitType::kBFloat16:
      return launch(BFloat16Logit());
    case LogitType::kFloat16:
      return launch(Float16Logit());
  }
}

}  // namespace

void launch_forward(LogitType type, const ForwardArguments& arguments, int64_t rows, cudaStream_t stream) {
  for_logit_type(type, [&](auto logit) {
    forward_kernel<decltype(logit), kThreads><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(arguments);
  });
}

void launch_backward(LogitType type, const BackwardArguments& arguments, int64_t rows, cudaStream_t stream) {
  for_logit_type(type, [&](auto logit) {
    backward_kernel<decltype(logit), kThreads><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(arguments);
  });
}

}  // namespace megatron_pd

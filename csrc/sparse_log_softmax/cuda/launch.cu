// Compiles the kernels for the GPU and starts them.
#include <cuda_runtime_api.h>

#include <algorithm>

#define MEGATRON_PD_CUDA_STREAM cudaStream_t
#include "kernels.cuh"

namespace megatron_pd {
namespace {

// Two blocks of 512 on a multiprocessor have 1024 · kBatch · 16 B = 64 KB of loads under way.
constexpr int kThreads = 512;
constexpr int kFinishThreads = 64;  // K is about that
// Below so many blocks a multiprocessor, some would stand idle while the last blocks run.
constexpr int64_t kBlocksWanted = 8;

dim3 grid(int64_t rows, int64_t parts) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(parts));
}

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

int64_t parts_of_a_row(LogitType type, int64_t rows, int64_t shard_size) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  // A part below one full batch of loads per thread would be all overhead.
  const int64_t size = type == LogitType::kFloat32 ? 4 : 2;
  const int64_t most = shard_size * size / (int64_t{kThreads} * kBatch * 16);
  const int64_t wanted = (kBlocksWanted * multiprocessors + rows - 1) / rows;
  return std::clamp<int64_t>(wanted, 1,
                             std::clamp<int64_t>(most, 1, 65535));  // the grid's y ends there
}

void launch_forward(LogitType type, const ForwardArguments& arguments, int64_t rows,
                    cudaStream_t stream) {
  for_logit_type(type, [&](auto logit) {
    using Logit = decltype(logit);
    forward_kernel<Logit, kThreads>
        <<<grid(rows, arguments.parts), kThreads, 0, stream>>>(arguments);
    finish_kernel<Logit, kFinishThreads><<<grid(rows, 1), kFinishThreads, 0, stream>>>(arguments);
  });
}

void launch_backward(LogitType type, const BackwardArguments& arguments, int64_t rows,
                     cudaStream_t stream) {
  for_logit_type(type, [&](auto logit) {
    backward_kernel<decltype(logit), kThreads>
        <<<grid(rows, arguments.parts), kThreads, 0, stream>>>(arguments);
  });
}

}  // namespace megatron_pd

// Compiles the kernels for the GPU and starts them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

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

// Calls `launch` with the logits' type and the number of temperatures, both as types.
template <class Launch>
void for_problem(LogitType type, int64_t each, const Launch& launch) {
  static_assert(kMostTemperatures == 2);
  const auto with = [&](auto logit) {
    if (each == 1)
      launch(logit, std::integral_constant<int, 1>());
    else
      launch(logit, std::integral_constant<int, 2>());
  };
  switch (type) {
    case LogitType::kFloat32:
      return with(Float32Logit());
    case LogitType::kBFloat16:
      return with(BFloat16Logit());
    case LogitType::kFloat16:
      return with(Float16Logit());
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
  for_problem(type, arguments.temperatures.count, [&](auto logit, auto each) {
    using Logit = decltype(logit);
    constexpr int kEach = decltype(each)::value;
    forward_kernel<Logit, kThreads, kEach>
        <<<grid(rows, arguments.parts), kThreads, 0, stream>>>(arguments);
    finish_kernel<Logit, kFinishThreads, kEach>
        <<<grid(rows, 1), kFinishThreads, 0, stream>>>(arguments);
  });
}

void launch_backward(LogitType type, const BackwardArguments& arguments, int64_t rows,
                     cudaStream_t stream) {
  for_problem(type, arguments.temperatures.count, [&](auto logit, auto each) {
    backward_kernel<decltype(logit), kThreads, decltype(each)::value>
        <<<grid(rows, arguments.parts), kThreads, 0, stream>>>(arguments);
  });
}

}  // namespace megatron_pd

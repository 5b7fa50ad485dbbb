// The CUDA kernel: one warp a row, its lanes on every 32nd entry. Sums go over the lanes by shuffles in
// a fixed order, so results are the same every time.
//
// Compiled by nvcc, and for the host by tests/csrc/cuda_emulator.h.
#pragma once

#include "../row.h"

namespace megatron_pd {

struct Warp {
  static constexpr unsigned kSize = 32, kAll = 0xffffffffu;

  __device__ __forceinline__ int64_t lane() const { return threadIdx.x % kSize; }
  __device__ __forceinline__ int64_t size() const { return kSize; }

  __device__ __forceinline__ float sum(float own) const {
    for (int distance = kSize / 2; distance > 0; distance /= 2) own += __shfl_xor_sync(kAll, own, distance);
    return own;
  }
  __device__ __forceinline__ float max(float own) const {
    for (int distance = kSize / 2; distance > 0; distance /= 2) {
      own = fmaxf(own, __shfl_xor_sync(kAll, own, distance));
    }
    return own;
  }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_divergence_kernel(Divergence<float> divergence, RowProblem<float> problem) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / Warp::kSize) + threadIdx.x / Warp::kSize;
  if (row < problem.rows) problem.solve_row(Warp(), divergence, row);
}

}  // namespace megatron_pd

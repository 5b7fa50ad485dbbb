// The CUDA kernel: one warp a row, its lanes on every 32nd entry. Sums go over the lanes by
// shuffles in a fixed order, so results are the same every time.
//
// Compiled by nvcc, and for the host by tests/csrc/cuda_emulator.h.
#pragma once

#include "../../warp.cuh"
#include "../row.h"

namespace megatron_pd {

struct Warp {
  __device__ __forceinline__ int64_t lane() const { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ int64_t size() const { return kWarpSize; }
  __device__ __forceinline__ float sum(float own) const { return sum_over_warp(own); }
  __device__ __forceinline__ float max(float own) const { return max_over_warp(own); }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    row_divergence_kernel(Divergence<float> divergence, RowProblem<float> problem) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row < problem.rows) problem.solve_row(Warp(), divergence, row);
}

}  // namespace megatron_pd

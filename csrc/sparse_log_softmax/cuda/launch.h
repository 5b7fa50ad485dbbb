// Starting the CUDA kernels: plain pointers to device memory, no torch, so that nvcc has little to
// read and the kernels can be compiled for the host as well.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace megatron_pd {

struct ForwardArguments {
  const void* logits;
  RowLayout layout;
  Ids ids;
  Shard shard;
  Temperatures temperatures;
  int64_t parts;   // blocks per row
  float* partial;  // [T, parts, 1+N], scratch: the parts' maximum and Σ exp
  float* max;      // [T]
  float* sums;     // [T, N+K]
};

struct BackwardArguments {
  const void* logits;
  RowLayout layout;
  void* gradient;  // may be the logits
  RowLayout gradient_layout;
  Ids ids;
  Shard shard;
  Temperatures temperatures;
  int64_t parts;           // blocks per row
  const float* max;        // [T]
  const float* sums;       // [T, N+K]
  const float* grad_logq;  // [T, N, K]
  const float* grad_lse;   // [T, N]
};

#ifdef MEGATRON_PD_CUDA_STREAM
// Blocks per row that keep the current device busy.
int64_t parts_of_a_row(LogitType type, int64_t rows, int64_t shard_size);
void launch_forward(LogitType type, const ForwardArguments& arguments, int64_t rows,
                    MEGATRON_PD_CUDA_STREAM stream);
void launch_backward(LogitType type, const BackwardArguments& arguments, int64_t rows,
                     MEGATRON_PD_CUDA_STREAM stream);
#endif

}  // namespace megatron_pd

// Compiles the kernel for the GPU and starts it.
#include "launch.h"

#include "kernel.cuh"

namespace megatron_pd {

void launch_row_divergence(const Divergence<float>& divergence, const RowProblem<float>& problem,
                           cudaStream_t stream) {
  constexpr int kThreads = 128, kRowsPerBlock = kThreads / kWarpSize;
  const auto blocks = static_cast<unsigned>((problem.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  row_divergence_kernel<kThreads><<<blocks, kThreads, 0, stream>>>(divergence, problem);
}

}  // namespace megatron_pd

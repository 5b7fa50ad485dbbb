#pragma once

#include <cuda_runtime_api.h>

#include "../row.h"

namespace megatron_pd {

void launch_row_divergence(const Divergence<float>& divergence, const RowProblem<float>& problem,
                           cudaStream_t stream);

}  // namespace megatron_pd

// The loops of rows.h for the logits' C++ types, and on which instruction set they run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "rows.h"
#include "../operators.h"

namespace megatron_pd {
namespace {

// torch's own choice of instruction set, so ATEN_CPU_CAPABILITY=default|avx2|avx512 limits both.
RowKernels best_row_kernels(LogitType type) {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    // torch has no name for the BF16 instructions beyond AVX-512.
    const bool limited = std::getenv("ATEN_CPU_CAPABILITY") != nullptr;
    const bool has_bf16 = __builtin_cpu_supports("avx512bf16") && !limited;
    return has_bf16 ? row_kernels_avx512_bf16(type) : row_kernels_avx512(type);
  }
  if (capability == "AVX2") return row_kernels_avx2(type);
#endif
  return row_kernels_baseline(type);
}

template <class T>
struct LogitTypeOf;
template <>
struct LogitTypeOf<float> {
  static constexpr LogitType value = LogitType::kFloat32;
};
template <>
struct LogitTypeOf<at::BFloat16> {
  static constexpr LogitType value = LogitType::kBFloat16;
};
template <>
struct LogitTypeOf<at::Half> {
  static constexpr LogitType value = LogitType::kFloat16;
};

// The row loops for one logit type and its accumulation type.
template <class Logit>
struct RowLoops {
  using Accumulator = float;
  RowKernels kernels = best_row_kernels(LogitTypeOf<Logit>::value);

  void statistics(const Logit* logits, int64_t count, const float* temperatures, int64_t each,
                  float* max, double* sums) const {
    kernels.statistics(logits, count, temperatures, each, max, sums);
  }
  void gradient(const Logit* logits, Logit* out, int64_t count, float max,
                const DenseTerm<float>* terms, int64_t each) const {
    kernels.gradient(logits, out, count, max, terms, each);
  }
  void maxima(const Logit* logits, int64_t count, int64_t group, float* out) const {
    kernels.maxima(logits, count, group, out);
  }
  int64_t candidates(const Logit* logits, int64_t begin, int64_t end, float threshold,
                     Candidate<float>* out) const {
    return kernels.candidates(logits, begin, end, threshold, out);
  }
  void log_prob_sums(const Logit* logits, int64_t count, float lse, double* sums) const {
    kernels.log_prob_sums(logits, count, lse, sums);
  }
};

// float64 is for checking gradients, so its loops are plain.
template <>
struct RowLoops<double> {
  using Accumulator = double;

  void statistics(const double* logits, int64_t count, const double* temperatures, int64_t each,
                  double* max, double* sums) const {
    *max = -std::numeric_limits<double>::infinity();
    for (int64_t v = 0; v < count; ++v) *max = logits[v] > *max ? logits[v] : *max;
    const double shift = std::isinf(*max) && *max < 0 ? 0.0 : *max;
    for (int64_t n = 0; n < each; ++n) {
      sums[n] = 0.0;
      for (int64_t v = 0; v < count; ++v)
        sums[n] += std::exp((logits[v] - shift) / temperatures[n]);
    }
  }
  void gradient(const double* logits, double* out, int64_t count, double max,
                const DenseTerm<double>* terms, int64_t each) const {
    for (int64_t v = 0; v < count; ++v) {
      double sum = 0.0;
      for (int64_t n = 0; n < each; ++n)
        sum -= terms[n].coefficient * std::exp((logits[v] - max) / terms[n].temperature);
      out[v] = sum;
    }
  }
  void maxima(const double* logits, int64_t count, int64_t group, double* out) const {
    for (int64_t start = 0; start < count; start += group) {
      double max = -std::numeric_limits<double>::infinity();
      for (int64_t v = start; v < std::min(start + group, count); ++v)
        max = logits[v] > max ? logits[v] : max;
      *out++ = max;
    }
  }
  int64_t candidates(const double* logits, int64_t begin, int64_t end, double threshold,
                     Candidate<double>* out) const {
    int64_t found = 0;
    for (int64_t v = begin; v < end; ++v)
      if (logits[v] >= threshold) out[found++] = {logits[v], static_cast<int32_t>(v)};
    return found;
  }
  void log_prob_sums(const double* logits, int64_t count, double lse, double* sums) const {
    std::fill(sums, sums + 3, 0.0);
    for (int64_t v = 0; v < count; ++v) {
      const double logp = logits[v] - lse, p = std::exp(logp);
      if (p != 0.0) sums[0] += p * logp;
      sums[1] += logp;
      sums[2] += logp * logp;
    }
  }
};

// Rows per task: enough of them that a task is worth a thread's wake-up.
int64_t grain(int64_t shard_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, shard_size));
}

// Calls `function` with a value of the logits' C++ type.
template <class Function>
void for_logit_type(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kDouble:
      return function(double());
    case at::kFloat:
      return function(float());
    case at::kBFloat16:
      return function(at::BFloat16());
    case at::kHalf:
      return function(at::Half());
    default:
      TORCH_CHECK_TYPE(false, "logits must be float64, float32, bfloat16 or float16; got ", type,
                       ".");
  }
}

}  // namespace
}  // namespace megatron_pd

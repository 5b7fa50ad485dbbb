// The loops over one row of logits, for each instruction set.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace megatron_pd {

// Largest logit and Σ exp((z − max)/temperature) for each of `each` temperatures, of `count`
// logits that are read once. A row without finite logits gives (−inf, 0); a NaN anywhere makes the
// sums NaN.
using RowStatistics = void (*)(const void* logits, int64_t count, const float* temperatures,
                               int64_t each, float* max, double* sums);

// −coefficient · exp((z − max)/temperature): the gradient through one log-sum-exp.
template <class Number>
struct DenseTerm {
  Number temperature, coefficient;
};

// gradient[v] = the sum of `each` such terms, one or two; `gradient` may be `logits`.
using RowGradient = void (*)(const void* logits, void* gradient, int64_t count, float max,
                             const DenseTerm<float>* terms, int64_t each);

// Groups of logits are of a multiple of so many.
constexpr int64_t kGroupUnit = 32;

// The largest logit of every `group` logits: ceil(count/group) of them; NaN counts for nothing.
using RowMaxima = void (*)(const void* logits, int64_t count, int64_t group, float* maxima);

template <class Number>
struct Candidate {
  Number value;
  int32_t column;
};

// The logits in [begin, end) that are at least `threshold`, in any order; returns how many.
using RowCandidates = int64_t (*)(const void* logits, int64_t begin, int64_t end, float threshold,
                                  Candidate<float>* candidates);

// Σ p·log p, Σ log p and Σ (log p)² of `count` logits, read once, with log p = z − lse. A logit of
// −∞ adds nothing to the first, and makes the others −∞ and ∞.
using RowLogProbSums = void (*)(const void* logits, int64_t count, float lse, double* sums);

struct RowKernels {
  RowStatistics statistics;
  RowGradient gradient;
  RowMaxima maxima;
  RowCandidates candidates;
  RowLogProbSums log_prob_sums;
};

RowKernels row_kernels_baseline(LogitType type);
#if defined(__x86_64__)
RowKernels row_kernels_avx2(LogitType type);
RowKernels row_kernels_avx512(LogitType type);
RowKernels row_kernels_avx512_bf16(LogitType type);
#endif

}  // namespace megatron_pd

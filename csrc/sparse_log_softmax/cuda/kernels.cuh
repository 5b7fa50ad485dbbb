// The CUDA kernels. A row is cut into `parts`, one block each: one part where the rows alone fill
// the GPU, several where they are few.
//
//   forward   each thread keeps the maximum and Σ exp of what it reads (online softmax), for one
//             temperature or for two, 16 bytes a load and four loads under way; the block merges
//             them into its part's two or three numbers.
//   finish    one small block per row merges the parts and gathers the K logits.
//   backward  the block sums the row's gradients, writes −coefficient·exp(z − max) over its part,
//   and
//             after a barrier writes the part's chosen logits again, their own gradients added.
//
// The logits are read once forward and read and written once backward; every other access is to
// [T, K] and [T, parts]. No atomics: an id that stands in several columns is summed by the thread
// of its first column, in column order, in float32, so results are the same every time. Indices are
// 64-bit.
//
// An id that isn't in the vocabulary gives NaN, since a kernel can't raise; −1 is padding.
//
// Compiled by nvcc, and for the host by tests/csrc/cuda_emulator.h.
#pragma once

#include "launch.h"
#include "logits.cuh"
#include "../../warp.cuh"

namespace megatron_pd {

constexpr int kBatch = 4;  // vectors that a thread has under way, to cover the memory's latency
constexpr int kBlocksPerMultiprocessor = 2;  // of the two kernels that pass over the logits

constexpr float kLog2E = 1.44269504088896341f;
#define MEGATRON_PD_INFINITY __builtin_huge_valf()

__device__ __forceinline__ float exp_scaled(float x, float scale) { return exp2f(x * scale); }

// Columns [begin, end) of part `index` of a row. All parts but the last have the same length, a
// multiple of 16 bytes in every logit type, and so the same alignment.
struct Part {
  int64_t begin, end;

  __device__ __forceinline__ Part(int64_t size, int64_t index, int64_t parts) {
    const int64_t length = ((size + parts - 1) / parts + 7) / 8 * 8;
    begin = index * length < size ? index * length : size;
    end = begin + length < size ? begin + length : size;
  }
};

// --- online softmax
// -------------------------------------------------------------------------------

// log2(e)/τ of a row's kEach temperatures.
template <int kEach>
struct Scales {
  float of[kEach];

  __device__ __forceinline__ Scales(const Temperatures& temperatures, int64_t row) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) of[n] = kLog2E / temperatures.at(row, n);
  }
};

// Σ exp((z − max)/τ) of the logits seen so far, for each temperature. A NaN doesn't enter the
// maximum but makes the sums NaN.
template <int kEach>
struct Running {
  float max = -MEGATRON_PD_INFINITY;
  float sum[kEach] = {};

  // What to subtract: nothing while only −inf was seen, as −inf − −inf isn't a number.
  __device__ __forceinline__ float shift() const {
    return max == -MEGATRON_PD_INFINITY ? 0.0f : max;
  }

  __device__ __forceinline__ void raise(float to, const Scales<kEach>& scales) {
    if (to <= max) return;
    if (max != -MEGATRON_PD_INFINITY) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) sum[n] *= exp_scaled(max - to, scales.of[n]);
    }
    max = to;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount], const Scales<kEach>& scales) {
    float largest = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, z[i]);
    if (largest > max) raise(largest, scales);  // false for NaN
    const float subtract = shift();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) sum[n] += exp_scaled(z[i] - subtract, scales.of[n]);
    }
  }

  __device__ __forceinline__ void merge(const Running& other, const Scales<kEach>& scales) {
    const float larger = fmaxf(max, other.max);
    raise(larger, scales);
    const bool rescale = other.max != -MEGATRON_PD_INFINITY && other.max != larger;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const float factor = rescale ? exp_scaled(other.max - larger, scales.of[n]) : 1.0f;
      sum[n] += other.sum[n] * factor;
    }
  }
};

// The same in all threads of the block.
template <int kThreads, int kEach>
__device__ __forceinline__ Running<kEach> merge_over_block(Running<kEach> own,
                                                           const Scales<kEach>& scales) {
  __shared__ float warp_max[kThreads / kWarpSize];
  __shared__ float warp_sum[kThreads / kWarpSize][kEach];
  Running<kEach> other;
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    other.max = __shfl_xor_sync(kAllLanes, own.max, distance);
#pragma unroll
    for (int n = 0; n < kEach; ++n) other.sum[n] = __shfl_xor_sync(kAllLanes, own.sum[n], distance);
    own.merge(other, scales);
  }
  if (threadIdx.x % kWarpSize == 0) {
    warp_max[threadIdx.x / kWarpSize] = own.max;
#pragma unroll
    for (int n = 0; n < kEach; ++n) warp_sum[threadIdx.x / kWarpSize][n] = own.sum[n];
  }
  __syncthreads();
  Running<kEach> all;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
    other.max = warp_max[warp];
#pragma unroll
    for (int n = 0; n < kEach; ++n) other.sum[n] = warp_sum[warp][n];
    all.merge(other, scales);
  }
  return all;
}

template <class Logit, int kThreads, int kEach>
__device__ __forceinline__ Running<kEach> read_row(const typename Logit::Storage* z, int64_t count,
                                                   const Scales<kEach>& scales) {
  using Row = Vector<Logit>;
  constexpr int kSize = Row::kSize;
  const Split<Logit> split(z, count);
  Running<kEach> running;

  const auto add_one = [&](int64_t index) {
    const float one[1] = {Logit::widen(z[index])};
    running.add(one, scales);
  };
  for (int64_t i = threadIdx.x; i < split.head; i += kThreads) add_one(i);
  for (int64_t i = split.tail + threadIdx.x; i < count; i += kThreads) add_one(i);

  const auto* body = z + split.head;
  int64_t i = threadIdx.x;
  for (; i + (kBatch - 1) * kThreads < split.vectors; i += kBatch * kThreads) {
    Row rows[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) rows[b] = Row::load(body + (i + b * kThreads) * kSize);
    float wide[kBatch * kSize];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) wide[b * kSize + k] = Logit::widen(rows[b].values[k]);
    }
    running.add(wide, scales);
  }
  for (; i < split.vectors; i += kThreads) {
    const Row row = Row::load(body + i * kSize);
    float wide[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) wide[k] = Logit::widen(row.values[k]);
    running.add(wide, scales);
  }
  return running;
}

// Grid [T, parts].
template <class Logit, int kThreads, int kEach>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(ForwardArguments in) {
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const typename Logit::Storage*>(in.logits) + in.layout.offset(row);
  const Scales<kEach> scales(in.temperatures, row);
  const Part part(in.shard.live, blockIdx.y, in.parts);
  const auto own = read_row<Logit, kThreads>(z + part.begin, part.end - part.begin, scales);
  const auto all = merge_over_block<kThreads>(own, scales);
  if (threadIdx.x == 0) {
    float* partial = in.partial + (1 + kEach) * (row * in.parts + blockIdx.y);
    partial[0] = all.max;
#pragma unroll
    for (int n = 0; n < kEach; ++n) partial[1 + n] = all.sum[n];
  }
}

// Grid [T].
template <class Logit, int kThreads, int kEach>
__global__ void __launch_bounds__(kThreads) finish_kernel(ForwardArguments in) {
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const typename Logit::Storage*>(in.logits) + in.layout.offset(row);
  float* sums = in.sums + row * (kEach + in.ids.count);
  if (threadIdx.x == 0) {
    const Scales<kEach> scales(in.temperatures, row);
    const float* partial = in.partial + (1 + kEach) * row * in.parts;
    Running<kEach> all, other;
    for (int64_t part = 0; part < in.parts; ++part, partial += 1 + kEach) {
      other.max = partial[0];
#pragma unroll
      for (int n = 0; n < kEach; ++n) other.sum[n] = partial[1 + n];
      all.merge(other, scales);
    }
    in.max[row] = all.max;
#pragma unroll
    for (int n = 0; n < kEach; ++n) sums[n] = all.sum[n];
  }
  for (int64_t j = threadIdx.x; j < in.ids.count; j += kThreads) {
    const int64_t id = in.ids.at(row, j);
    const int64_t column = in.shard.place(id);
    float picked = column < 0 ? 0.0f : Logit::widen(z[column]);
    if (id != kPaddingId && !in.shard.is_known(id)) picked = __builtin_nanf("");
    sums[kEach + j] = picked;
  }
}

// --- backward
// -------------------------------------------------------------------------------------

// Of the softmax at each temperature, in a row's gradient.
template <int kEach>
struct Coefficients {
  float of[kEach];
};

// Each value summed over the block, in place.
template <int kThreads, int kEach>
__device__ __forceinline__ void sum_over_block(float (&values)[kEach]) {
  __shared__ float warp_sum[kThreads / kWarpSize][kEach];
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    values[n] = sum_over_warp(values[n]);
    if (threadIdx.x % kWarpSize == 0) warp_sum[threadIdx.x / kWarpSize][n] = values[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    values[n] = 0.0f;
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) values[n] += warp_sum[warp][n];
  }
}

// out[i] = function(z[i]) for the block's row, in vectors where both rows can be read as such.
template <class Logit, int kThreads, class Function>
__device__ __forceinline__ void map_row(const typename Logit::Storage* z,
                                        typename Logit::Storage* out, int64_t count,
                                        const Function& function) {
  using Row = Vector<Logit>;
  constexpr int kSize = Row::kSize;
  const bool same_alignment =
      reinterpret_cast<uintptr_t>(z) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
  Split<Logit> split(z, count);
  if (!same_alignment) split.head = count, split.vectors = 0, split.tail = count;

  for (int64_t i = threadIdx.x; i < split.head; i += kThreads)
    out[i] = Logit::narrow(function(Logit::widen(z[i])));
  for (int64_t i = split.tail + threadIdx.x; i < count; i += kThreads) {
    out[i] = Logit::narrow(function(Logit::widen(z[i])));
  }
  const auto* body = z + split.head;
  auto* out_body = out + split.head;
  int64_t i = threadIdx.x;
  for (; i + (kBatch - 1) * kThreads < split.vectors; i += kBatch * kThreads) {
    Row rows[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) rows[b] = Row::load(body + (i + b * kThreads) * kSize);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        rows[b].values[k] = Logit::narrow(function(Logit::widen(rows[b].values[k])));
      rows[b].store(out_body + (i + b * kThreads) * kSize);
    }
  }
  for (; i < split.vectors; i += kThreads) {
    Row row = Row::load(body + i * kSize);
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      row.values[k] = Logit::narrow(function(Logit::widen(row.values[k])));
    row.store(out_body + i * kSize);
  }
}

template <class Logit, int kThreads>
__device__ __forceinline__ void clear_row(typename Logit::Storage* out, int64_t count) {
  using Row = Vector<Logit>;
  const Split<Logit> split(out, count);
  const Row zeros = {};
  for (int64_t i = threadIdx.x; i < split.head; i += kThreads) out[i] = 0;
  for (int64_t i = split.tail + threadIdx.x; i < count; i += kThreads) out[i] = 0;
  for (int64_t i = threadIdx.x; i < split.vectors; i += kThreads)
    zeros.store(out + split.head + i * Row::kSize);
}

// Sums of the gradients on `ids[j]`, and whether j is the first column that has this id. All
// threads go through the row together and without a branch, so that loads are shared by the warp
// and overlap.
template <int kEach>
struct TotalOfId {
  float values[kEach] = {};
  bool is_first = true;

  // `grad_logq` is the row's, [kEach, K].
  __device__ __forceinline__ TotalOfId(const Ids& ids, int64_t row, int64_t j,
                                       const float* grad_logq) {
    const int64_t id = ids.at(row, j);
    for (int64_t i = 0; i < ids.count; ++i) {
      const bool same = ids.at(row, i) == id;
#pragma unroll
      for (int n = 0; n < kEach; ++n) values[n] += same ? grad_logq[n * ids.count + i] : 0.0f;
      is_first = is_first && !(same && i < j);
    }
  }
};

// Grid [T, parts].
template <class Logit, int kThreads, int kEach>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(BackwardArguments in) {
  using Storage = typename Logit::Storage;
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const Storage*>(in.logits) + in.layout.offset(row);
  auto* out = static_cast<Storage*>(in.gradient) + in.gradient_layout.offset(row);
  const float* sums = in.sums + row * (kEach + in.ids.count);
  const float* grad_logq = in.grad_logq + row * kEach * in.ids.count;
  const Scales<kEach> scales(in.temperatures, row);
  const float max = in.max[row];

  Coefficients<kEach> coefficients = {};
  for (int64_t j = threadIdx.x; j < in.ids.count; j += kThreads) {
    const bool counts = in.ids.at(row, j) != kPaddingId;
#pragma unroll
    for (int n = 0; n < kEach; ++n)
      coefficients.of[n] += counts ? grad_logq[n * in.ids.count + j] : 0.0f;
  }
  sum_over_block<kThreads>(coefficients.of);
  // A row without gradient (a masked token) isn't even read, so that what it holds can't matter.
  bool dense = false;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const float mass = coefficients.of[n] - in.grad_lse[row * kEach + n];
    coefficients.of[n] = mass == 0.0f ? 0.0f : mass / (sums[n] * in.temperatures.at(row, n));
    dense = dense || mass != 0.0f;
  }
  const auto dense_gradient = [=](float logit) {
    float gradient = 0.0f;
#pragma unroll
    for (int n = 0; n < kEach; ++n)
      gradient -= coefficients.of[n] * exp_scaled(logit - max, scales.of[n]);
    return gradient;
  };

  const Part part(in.shard.size, blockIdx.y, in.parts);
  const int64_t live_end = part.end < in.shard.live ? part.end : in.shard.live;
  const int64_t clear_from = dense && live_end > part.begin ? live_end : part.begin;
  map_row<Logit, kThreads>(z + part.begin, out + part.begin, clear_from - part.begin,
                           dense_gradient);
  clear_row<Logit, kThreads>(out + clear_from, part.end - clear_from);
  __syncthreads();  // the chosen logits are written again, by other threads
  for (int64_t j = threadIdx.x; j < in.ids.count; j += kThreads) {
    const int64_t column = in.shard.place(in.ids.at(row, j));
    if (column < part.begin || column >= part.end) continue;
    const TotalOfId<kEach> total(in.ids, row, j, grad_logq);
    if (!total.is_first) continue;
    float gradient = dense ? dense_gradient(sums[kEach + j]) : 0.0f;
#pragma unroll
    for (int n = 0; n < kEach; ++n) gradient += total.values[n] / in.temperatures.at(row, n);
    out[column] = Logit::narrow(gradient);
  }
}

}  // namespace megatron_pd

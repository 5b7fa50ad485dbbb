// The CUDA kernels. A row is cut into `parts`, one block each: one part where the rows alone fill
// the GPU, several where they are few.
//
//   forward   each thread keeps the maximum and Σ exp of what it reads (online softmax), 16 bytes a
//             load and four loads under way; the block merges them into its part's two numbers.
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

// Σ exp((z − max)/τ) of the logits seen so far. A NaN doesn't enter the maximum but makes the sum
// NaN.
struct Running {
  float max = -MEGATRON_PD_INFINITY;
  float sum = 0.0f;

  // What to subtract: nothing while only −inf was seen, as −inf − −inf isn't a number.
  __device__ __forceinline__ float shift() const {
    return max == -MEGATRON_PD_INFINITY ? 0.0f : max;
  }

  __device__ __forceinline__ void raise(float to, float scale) {
    if (to <= max) return;
    if (max != -MEGATRON_PD_INFINITY) sum *= exp_scaled(max - to, scale);
    max = to;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount], float scale) {
    float largest = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, z[i]);
    if (largest > max) raise(largest, scale);  // false for NaN
    const float subtract = shift();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp_scaled(z[i] - subtract, scale);
  }

  __device__ __forceinline__ void merge(float other_max, float other_sum, float scale) {
    const float larger = fmaxf(max, other_max);
    raise(larger, scale);
    const bool rescale = other_max != -MEGATRON_PD_INFINITY && other_max != larger;
    sum += rescale ? other_sum * exp_scaled(other_max - larger, scale) : other_sum;
  }
};

// The same in all threads of the block.
template <int kThreads>
__device__ __forceinline__ Running merge_over_block(Running own, float scale) {
  __shared__ float warp_max[kThreads / kWarpSize];
  __shared__ float warp_sum[kThreads / kWarpSize];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const float other_max = __shfl_xor_sync(kAllLanes, own.max, distance);
    const float other_sum = __shfl_xor_sync(kAllLanes, own.sum, distance);
    own.merge(other_max, other_sum, scale);
  }
  if (threadIdx.x % kWarpSize == 0) {
    warp_max[threadIdx.x / kWarpSize] = own.max;
    warp_sum[threadIdx.x / kWarpSize] = own.sum;
  }
  __syncthreads();
  Running all;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp)
    all.merge(warp_max[warp], warp_sum[warp], scale);
  return all;
}

template <class Logit, int kThreads>
__device__ __forceinline__ Running read_row(const typename Logit::Storage* z, int64_t count,
                                            float scale) {
  using Row = Vector<Logit>;
  constexpr int kSize = Row::kSize;
  const Split<Logit> split(z, count);
  Running running;

  const auto add_one = [&](int64_t index) {
    const float one[1] = {Logit::widen(z[index])};
    running.add(one, scale);
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
    running.add(wide, scale);
  }
  for (; i < split.vectors; i += kThreads) {
    const Row row = Row::load(body + i * kSize);
    float wide[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) wide[k] = Logit::widen(row.values[k]);
    running.add(wide, scale);
  }
  return running;
}

// Grid [T, parts].
template <class Logit, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(ForwardArguments in) {
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const typename Logit::Storage*>(in.logits) + in.layout.offset(row);
  const float scale = kLog2E / in.temperatures.at(row);
  const Part part(in.shard.live, blockIdx.y, in.parts);
  const Running own = read_row<Logit, kThreads>(z + part.begin, part.end - part.begin, scale);
  const Running all = merge_over_block<kThreads>(own, scale);
  if (threadIdx.x == 0) {
    float* partial = in.partial + 2 * (row * in.parts + blockIdx.y);
    partial[0] = all.max;
    partial[1] = all.sum;
  }
}

// Grid [T].
template <class Logit, int kThreads>
__global__ void __launch_bounds__(kThreads) finish_kernel(ForwardArguments in) {
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const typename Logit::Storage*>(in.logits) + in.layout.offset(row);
  float* sums = in.sums + row * (1 + in.ids.count);
  if (threadIdx.x == 0) {
    const float scale = kLog2E / in.temperatures.at(row);
    const float* partial = in.partial + 2 * row * in.parts;
    Running all;
    for (int64_t part = 0; part < in.parts; ++part)
      all.merge(partial[2 * part], partial[2 * part + 1], scale);
    in.max[row] = all.max;
    sums[0] = all.sum;
  }
  for (int64_t j = threadIdx.x; j < in.ids.count; j += kThreads) {
    const int64_t id = in.ids.at(row, j);
    const int64_t column = in.shard.place(id);
    float picked = column < 0 ? 0.0f : Logit::widen(z[column]);
    if (id != kPaddingId && !in.shard.is_known(id)) picked = __builtin_nanf("");
    sums[1 + j] = picked;
  }
}

// --- backward
// -------------------------------------------------------------------------------------

template <int kThreads>
__device__ __forceinline__ float sum_over_block(float own) {
  __shared__ float warp_sum[kThreads / kWarpSize];
  own = sum_over_warp(own);
  if (threadIdx.x % kWarpSize == 0) warp_sum[threadIdx.x / kWarpSize] = own;
  __syncthreads();
  float all = 0.0f;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) all += warp_sum[warp];
  return all;
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

// Sum of the gradients on `ids[j]`, and whether j is the first column that has this id. All threads
// go through the row together and without a branch, so that loads are shared by the warp and
// overlap.
struct TotalOfId {
  float value = 0.0f;
  bool is_first = true;

  __device__ __forceinline__ TotalOfId(const Ids& ids, int64_t row, int64_t j,
                                       const float* grad_logq) {
    const int64_t id = ids.at(row, j);
    for (int64_t i = 0; i < ids.count; ++i) {
      const bool same = ids.at(row, i) == id;
      value += same ? grad_logq[i] : 0.0f;
      is_first = is_first && !(same && i < j);
    }
  }
};

// Grid [T, parts].
template <class Logit, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(BackwardArguments in) {
  using Storage = typename Logit::Storage;
  const int64_t row = blockIdx.x;
  const auto* z = static_cast<const Storage*>(in.logits) + in.layout.offset(row);
  auto* out = static_cast<Storage*>(in.gradient) + in.gradient_layout.offset(row);
  const float* sums = in.sums + row * (1 + in.ids.count);
  const float* grad_logq = in.grad_logq + row * in.ids.count;
  const float temperature = in.temperatures.at(row);
  const float scale = kLog2E / temperature;
  const float max = in.max[row];

  float own = 0.0f;
  for (int64_t j = threadIdx.x; j < in.ids.count; j += kThreads) {
    if (in.ids.at(row, j) != kPaddingId) own += grad_logq[j];
  }
  const float mass = sum_over_block<kThreads>(own) - in.grad_lse[row];
  // A row without gradient (a masked token) isn't even read, so that what it holds can't matter.
  const bool dense = mass != 0.0f;
  const float coefficient = dense ? mass / (sums[0] * temperature) : 0.0f;
  const auto dense_gradient = [=](float logit) {
    return -coefficient * exp_scaled(logit - max, scale);
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
    const TotalOfId total(in.ids, row, j, grad_logq);
    if (!total.is_first) continue;
    const float rest = dense ? dense_gradient(sums[1 + j]) : 0.0f;
    out[column] = Logit::narrow(total.value / temperature + rest);
  }
}

}  // namespace megatron_pd

// The storage types of logits on the GPU, and 16-byte access to them.
//
// On a GPU the conversions are single instructions. Compiled for the host they come from the
// emulator, which defines the same four functions.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace megatron_pd {
__device__ __forceinline__ float float_of_bfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t bfloat16_of_float(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ float float_of_float16(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float16_of_float(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
}  // namespace megatron_pd
#endif

namespace megatron_pd {

struct Float32Logit {
  using Storage = float;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

struct BFloat16Logit {
  using Storage = uint16_t;
  static __device__ __forceinline__ float widen(uint16_t x) { return float_of_bfloat16(x); }
  static __device__ __forceinline__ uint16_t narrow(float x) { return bfloat16_of_float(x); }
};

struct Float16Logit {
  using Storage = uint16_t;
  static __device__ __forceinline__ float widen(uint16_t x) { return float_of_float16(x); }
  static __device__ __forceinline__ uint16_t narrow(float x) { return float16_of_float(x); }
};

// 16 bytes, the widest access that a thread has.
template <class Logit>
struct Vector {
  using Storage = typename Logit::Storage;
  static constexpr int kSize = 16 / sizeof(Storage);
  Storage values[kSize];

  static __device__ __forceinline__ Vector load(const Storage* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    Vector vector;
    __builtin_memcpy(&vector, &raw, sizeof raw);
    return vector;
  }
  __device__ __forceinline__ void store(Storage* to) const {
    uint4 raw;
    __builtin_memcpy(&raw, this, sizeof raw);
    *reinterpret_cast<uint4*>(to) = raw;
  }
};

// A row as vectors with single elements before the first 16-byte boundary and after the last: with
// V odd, every other bf16 row starts between boundaries.
template <class Logit>
struct Split {
  using Storage = typename Logit::Storage;
  int64_t head;  // elements before the first vector
  int64_t vectors;
  int64_t tail;  // index of the first element after the last vector

  __device__ __forceinline__ Split(const Storage* row, int64_t count) {
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16);
    head = misaligned == 0 ? 0 : (16 - misaligned) / static_cast<int64_t>(sizeof(Storage));
    if (head > count) head = count;
    vectors = (count - head) / Vector<Logit>::kSize;
    tail = head + vectors * Vector<Logit>::kSize;
  }
};

}  // namespace megatron_pd

// What the lanes of a warp do together.
#pragma once

namespace megatron_pd {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The same in all lanes, and in the same order of summing every time.
__device__ __forceinline__ float sum_over_warp(float own) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    own += __shfl_xor_sync(kAllLanes, own, distance);
  return own;
}

__device__ __forceinline__ float max_over_warp(float own) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    own = fmaxf(own, __shfl_xor_sync(kAllLanes, own, distance));
  }
  return own;
}

}  // namespace megatron_pd

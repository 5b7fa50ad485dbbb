// What one call is about, in plain numbers: shared by the CPU and the CUDA kernels.
//
// T rows (tokens), V logits of a row (this rank's shard of the vocabulary), K ids per row, N
// temperatures of each row.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace megatron_pd {

enum class LogitType { kFloat32, kBFloat16, kFloat16 };

// Rows of a [outer, inner, V] tensor whose last stride is 1. Two leading dimensions are enough for
// Megatron's [s, b, V] and for its transpose, so neither has to be copied.
struct RowLayout {
  int64_t inner;         // rows per outer index
  int64_t outer_stride;  // elements
  int64_t inner_stride;  // elements

  // 64-bit throughout: rows × V passes 2^31 at 16,384 tokens of a 131,072-piece vocabulary.
  MEGATRON_PD_HOST_DEVICE int64_t offset(int64_t row) const {
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

// Global vocabulary ids, [T, K] contiguous, −1 where a row has fewer than K.
struct Ids {
  const void* data;
  bool is_64_bit;
  int64_t count;  // K

  MEGATRON_PD_HOST_DEVICE int64_t at(int64_t row, int64_t column) const {
    const int64_t index = row * count + column;
    return is_64_bit ? static_cast<const int64_t*>(data)[index]
                     : static_cast<const int32_t*>(data)[index];
  }
};

constexpr int64_t kPaddingId = -1;

// The part of the vocabulary that this rank's logits hold.
struct Shard {
  int64_t first_id;    // global id of its first logit
  int64_t size;        // V
  int64_t live;        // how many are true vocabulary ids; the rest pads V and counts for nothing
  int64_t vocab_size;  // true size of the whole vocabulary

  MEGATRON_PD_HOST_DEVICE bool is_known(int64_t id) const { return id >= 0 && id < vocab_size; }

  // Place of `id` on this rank, or −1 if another rank holds it.
  MEGATRON_PD_HOST_DEVICE int64_t place(int64_t id) const {
    const int64_t place = id - first_id;
    return place >= 0 && place < live ? place : -1;
  }
};

constexpr int64_t kMostTemperatures = 2;

// [T, N], or [1, N] for all rows.
struct Temperatures {
  const float* data;
  bool per_row;
  int64_t count;  // N

  MEGATRON_PD_HOST_DEVICE float at(int64_t row, int64_t n) const {
    return data[(per_row ? row : 0) * count + n];
  }
};

}  // namespace megatron_pd

// Parsed entropy models of the shards in use: about 1.3 MB each at a vocabulary of 150,000, so a
// store of thousands of shards cannot keep all of them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "compact/entropy_model.h"

namespace logit_codec {

class ModelCache {
 public:
  static ModelCache& instance();

  // Null where it isn't there.
  std::shared_ptr<const EntropyModel> find(uint64_t shard, uint64_t offset);
  void add(uint64_t shard, uint64_t offset, std::shared_ptr<const EntropyModel> model);

 private:
  struct Entry {
    uint64_t shard, offset, used;
    std::shared_ptr<const EntropyModel> model;
  };
  static constexpr size_t kCapacityBytes = 256 << 20;

  ModelCache();

  std::mutex mutex_;
  std::vector<Entry> entries_;
  size_t bytes_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace logit_codec

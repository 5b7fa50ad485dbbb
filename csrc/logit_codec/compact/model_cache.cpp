#include "compact/model_cache.h"

#include <pthread.h>

#include <algorithm>

namespace logit_codec {

ModelCache& ModelCache::instance() {
  static ModelCache cache;
  return cache;
}

// A DataLoader worker may be forked while another thread reads: no lock may be lost in it.
ModelCache::ModelCache() {
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                 [] { instance().mutex_.unlock(); });
}

std::shared_ptr<const EntropyModel> ModelCache::find(uint64_t shard, uint64_t offset) {
  const std::lock_guard lock(mutex_);
  for (Entry& entry : entries_) {
    if (entry.shard == shard && entry.offset == offset) {
      entry.used = ++clock_;
      return entry.model;
    }
  }
  return nullptr;
}

void ModelCache::add(uint64_t shard, uint64_t offset, std::shared_ptr<const EntropyModel> model) {
  const std::lock_guard lock(mutex_);
  bytes_ += model->bytes();
  while (bytes_ > kCapacityBytes && !entries_.empty()) {
    const auto older = [](const Entry& a, const Entry& b) { return a.used < b.used; };
    const auto oldest = std::min_element(entries_.begin(), entries_.end(), older);
    bytes_ -= oldest->model->bytes();
    entries_.erase(oldest);
  }
  entries_.push_back({shard, offset, ++clock_, std::move(model)});
}

}  // namespace logit_codec

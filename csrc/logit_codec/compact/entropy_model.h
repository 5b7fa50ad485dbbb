// What blocks of the `compact` codec are coded with: the vocabulary's order, and a model for every
// context.  Trained on rows already seen, kept in the shard in a frame of its own.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "compact/contexts.h"
#include "compact/quantizer.h"
#include "compact/rans.h"
#include "compact/vocabulary_order.h"
#include "rows.h"

namespace logit_codec {

class EntropyModel {
 public:
  // Throws Corrupt where the payload of a frame is no entropy model of this layout.
  EntropyModel(Bytes payload, const Layout& layout);

  // The payload.  id_counts: how often each id was seen so far; sample: rows to fit.
  static std::vector<uint8_t> train(const Layout& layout, std::span<const uint64_t> id_counts,
                                    const Rows& sample,
                                    size_t entries_per_class = VocabularyOrder::kEntriesPerClass);

  const Layout& layout() const { return layout_; }
  const Quantizer& quantizer() const { return quantizer_; }
  const VocabularyOrder& order() const { return order_; }
  const ContextModel& model(int context) const { return models_[model_of_[context]]; }

  // For decoding, models have numbers.
  uint32_t model_of(int context) const { return model_of_[context]; }
  const DecodingModel& decoding(uint32_t model) const { return decoding_[model]; }

  // The models of values at a place: by the code before, or by the kind of the draws before.
  const uint16_t* value_models(int place) const {
    return value_models_.data() + size_t(place) * values_before_;
  }

  size_t bytes() const {
    return sizeof(*this) + order_.bytes() + 2 * value_models_.size() +
           models_.size() * (sizeof(ContextModel) + sizeof(DecodingModel));
  }

 private:
  EntropyModel(BitReader in, uint32_t seen, const Layout& layout);

  Layout layout_;
  const Quantizer& quantizer_;
  VocabularyOrder order_;
  std::vector<ContextModel> models_;  // the first does for all contexts without one of their own
  std::array<uint16_t, kContexts> model_of_;
  std::vector<DecodingModel> decoding_;
  size_t values_before_;
  std::vector<uint16_t> value_models_;
};

}  // namespace logit_codec

// The tables that blocks of the `compact` codec are coded with: which id has which rank, and a
// model for every context.  Trained on rows already seen, kept in the shard in a frame of their own.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "bytes.h"
#include "compact/contexts.h"
#include "compact/quantizer.h"
#include "compact/rans.h"
#include "compact/vocabulary_order.h"
#include "rows.h"

namespace logit_codec {

class Tables {
   public:
    Tables(Bytes payload, const Layout& layout);

    // Payload of a tables frame.  id_counts: how often each id was seen so far; rows: a sample.
    static std::vector<uint8_t> train(const Layout& layout, Span<const uint64_t> id_counts,
                                      const Rows& sample,
                                      size_t entries_per_class = Ranks::kEntriesPerClass);

    const Layout& layout() const { return layout_; }
    const Grid& grid() const { return grid_; }
    const Ranks& ranks() const { return ranks_; }
    const Model& model(int context) const { return models_[model_of_[context]]; }

    // For decoding, models have numbers.
    uint32_t model_of(int context) const { return model_of_[context]; }
    const DecodingModel& decoding(uint32_t model) const { return decoding_[model]; }

    // The models of values at a place: by the code before, or by the kind of the draws before.
    const uint16_t* value_models(int place) const {
        return value_models_.data() + size_t(place) * values_before_;
    }

    size_t bytes() const {
        return sizeof(*this) + ranks_.bytes() + 2 * value_models_.size() +
               models_.size() * (sizeof(Model) + sizeof(DecodingModel));
    }

   private:
    Tables(BitReader in, uint32_t seen, const Layout& layout);

    Layout layout_;
    const Grid& grid_;
    Ranks ranks_;
    std::vector<Model> models_;  // the first does for all contexts without one of their own
    std::array<uint16_t, kContexts> model_of_;
    std::vector<DecodingModel> decoding_;
    size_t values_before_;
    std::vector<uint16_t> value_models_;
};

}  // namespace logit_codec

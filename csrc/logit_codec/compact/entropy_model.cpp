#include "compact/entropy_model.h"

#include "compact/buckets.h"

namespace logit_codec {
namespace {

ContextModel get_model(BitReader& in, int context) {
  ContextModel model;
  uint32_t left = kTotal, next = 0;
  for (uint32_t symbols = in.get_gamma(); symbols > 1; --symbols) {
    const uint32_t symbol = next + in.get_gamma() - 1, frequency = in.get_gamma();
    if (symbol >= kSymbols)
      refuse("context ", context, " lists symbol ", symbol, " before bit ", in.position(),
             "; there are ", kSymbols, " symbols");
    if (frequency >= left)
      refuse("context ", context, " gives symbol ", symbol, " a frequency of ", frequency,
             " before bit ", in.position(), "; less than ", left, " of ", kTotal, " are left");
    model.frequency[symbol] = uint16_t(frequency);
    left -= frequency;
    next = symbol + 1;
  }
  model.frequency[kEscape] = uint16_t(left);
  model.place();
  return model;
}

uint32_t checked_seen(Bytes payload, const Layout& layout) {
  const auto vocab_size = load<uint32_t>(payload, 0), seen = load<uint32_t>(payload, 4);
  if (vocab_size != layout.vocab_size)
    refuse("it is of a vocabulary of ", vocab_size, ", the shard of one of ", layout.vocab_size);
  if (seen > vocab_size) refuse("it was trained on ", seen, " ids of a vocabulary of ", vocab_size);
  return seen;
}

}  // namespace

EntropyModel::EntropyModel(Bytes payload, const Layout& layout)
    : EntropyModel(BitReader(part(payload, 8, payload.size() < 8 ? 0 : payload.size() - 8)),
                   checked_seen(payload, layout), layout) {}

EntropyModel::EntropyModel(BitReader in, uint32_t seen, const Layout& layout)
    : layout_(layout),
      quantizer_(Quantizer::of(layout.value_bits)),
      order_(in, layout.vocab_size, seen) {
  models_.push_back(ContextModel::fit({}));
  for (int context = 0; context < kContexts; ++context) {
    const ContextModel found = get_model(in, context);
    const bool trained = found.frequency[kEscape] != kTotal;
    model_of_[context] = trained ? uint16_t(models_.size()) : 0;
    if (trained) models_.push_back(found);
  }
  in.finish();
  for (const ContextModel& model : models_) decoding_.emplace_back(model);
  values_before_ = layout.draws ? kValueKinds : quantizer_.max_code() + 1;
  for (int place = 0; place < kPlaces; ++place)
    for (uint32_t before = 0; before < values_before_; ++before) {
      const int kind = layout.draws ? int(before) : quantizer_.kind(before);
      value_models_.push_back(model_of_[next_value_context(place, kind)]);
    }
}

}  // namespace logit_codec

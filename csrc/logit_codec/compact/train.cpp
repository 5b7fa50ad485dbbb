// Training of the entropy model.

#include <algorithm>
#include <numeric>

#include "compact/buckets.h"
#include "compact/coded_rows.h"
#include "compact/entropy_model.h"
#include "compact/symbol_stream.h"

namespace logit_codec {
namespace {

using Histogram = std::array<double, 256>;

// Good and Turing: ids never seen so far will come as often as ids seen once did.
void add_unseen(Histogram& histogram, double mass, const VocabularyOrder& order) {
  const uint32_t seen = order.seen(), vocab_size = order.vocab_size();
  if (seen == vocab_size) return;
  for (uint32_t symbol = bucket_of(seen).symbol; symbol < kSymbols; ++symbol) {
    const uint64_t first = std::max(bucket_named(symbol).first, seen);
    const uint64_t end = symbol + 1 < kSymbols ? bucket_named(symbol + 1).first : vocab_size;
    const uint64_t last = std::min<uint64_t>(end, vocab_size);
    if (first < last) histogram[symbol] += mass * double(last - first) / (vocab_size - seen);
  }
}

// The escape's frequency is what the others leave.
void put_model(BitWriter& out, const ContextModel& model) {
  out.put_gamma(256 - uint32_t(std::count(model.frequency.begin(), model.frequency.end(), 0)));
  uint32_t next = 0;
  for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
    if (!model.has(symbol)) continue;
    out.put_gamma(symbol - next + 1);
    out.put_gamma(model.frequency[symbol]);
    next = symbol + 1;
  }
}

}  // namespace

std::vector<uint8_t> EntropyModel::train(const Layout& layout, std::span<const uint64_t> id_counts,
                                         const Rows& sample, size_t entries_per_class) {
  const VocabularyOrder order = VocabularyOrder::train(id_counts, sample, entries_per_class);
  const Quantizer& quantizer = Quantizer::of(layout.value_bits);
  std::vector<Histogram> histograms(kContexts);
  for_each_number(layout, quantizer,
                  code_rows(layout, quantizer, order, OrdinalOfId(order), sample),
                  [&](int, int context, uint32_t number) {
                    histograms[context][bucket_of(number).symbol] += 1;
                  });
  double once = 0;
  for (const int32_t id : sample.ids) once += id_counts[size_t(id)] == 1;
  const double share = once / double(std::max<size_t>(sample.ids.size(), 1));
  for (int context = 0; context < kIdContexts; ++context) {
    Histogram& histogram = histograms[context];
    const double total = std::accumulate(histogram.begin(), histogram.end(), 0.0);
    add_unseen(histogram, share * total, order);
  }

  std::vector<uint8_t> out;
  store(out, layout.vocab_size);
  store(out, order.seen());
  BitWriter bits;
  order.put(bits);
  for (const Histogram& histogram : histograms) put_model(bits, ContextModel::fit(histogram));
  const std::vector<uint8_t> packed = bits.finish();
  out.insert(out.end(), packed.begin(), packed.end());
  return out;
}

}  // namespace logit_codec

#include "compact/entropy_model.h"

#include <algorithm>
#include <numeric>

#include "compact/block.h"
#include "compact/buckets.h"
#include "compact/symbol_stream.h"

namespace logit_codec {
namespace {

using Histogram = std::array<double, 256>;

// Good and Turing: ids never seen so far will come as often as ids seen once did.
void add_unseen(Histogram& histogram, double mass, const Ranks& ranks) {
    const uint32_t seen = ranks.seen(), vocab_size = ranks.vocab_size();
    if (seen == vocab_size) return;
    for (uint32_t symbol = bucket_of(seen).symbol; symbol < kSymbols; ++symbol) {
        const uint64_t first = std::max(bucket_named(symbol).first, seen);
        const uint64_t end = symbol + 1 < kSymbols ? bucket_named(symbol + 1).first : vocab_size;
        const uint64_t last = std::min<uint64_t>(end, vocab_size);
        if (first < last) histogram[symbol] += mass * double(last - first) / (vocab_size - seen);
    }
}

// The escape's frequency is what the others leave.
void put_model(BitWriter& out, const Model& model) {
    out.put_gamma(256 - uint32_t(std::count(model.frequency.begin(), model.frequency.end(), 0)));
    uint32_t next = 0;
    for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        if (!model.has(symbol)) continue;
        out.put_gamma(symbol - next + 1);
        out.put_gamma(model.frequency[symbol]);
        next = symbol + 1;
    }
}

Model get_model(BitReader& in) {
    Model model;
    uint32_t left = kTotal, next = 0;
    for (uint32_t symbols = in.get_gamma(); symbols > 1; --symbols) {
        const uint32_t symbol = next + in.get_gamma() - 1, frequency = in.get_gamma();
        if (symbol >= kSymbols || frequency >= left)
            throw Corrupt("a model lists its symbols wrongly");
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
    if (vocab_size != layout.vocab_size || seen > vocab_size)
        throw Corrupt("the tables are of another vocabulary");
    return seen;
}

}  // namespace

std::vector<uint8_t> Tables::train(const Layout& layout, Span<const uint64_t> id_counts,
                                   const Rows& sample, size_t entries_per_class) {
    const Ranks ranks = Ranks::train(id_counts, sample, entries_per_class);
    const Grid& grid = Grid::of(layout.value_bits);
    std::vector<Histogram> histograms(kContexts);
    for_each_number(layout, grid, code_rows(layout, grid, ranks, RankOfId(ranks), sample),
                    [&](int, int context, uint32_t number) {
                        histograms[context][bucket_of(number).symbol] += 1;
                    });
    double once = 0;
    for (const int32_t id : sample.ids) once += id_counts[size_t(id)] == 1;
    const double share = once / double(std::max<size_t>(sample.ids.size(), 1));
    for (int context = 0; context < kIdContexts; ++context) {
        Histogram& histogram = histograms[context];
        const double total = std::accumulate(histogram.begin(), histogram.end(), 0.0);
        add_unseen(histogram, share * total, ranks);
    }

    std::vector<uint8_t> out;
    store(out, layout.vocab_size);
    store(out, ranks.seen());
    BitWriter bits;
    ranks.put(bits);
    for (const Histogram& histogram : histograms) put_model(bits, Model::fit(histogram));
    const std::vector<uint8_t> packed = bits.finish();
    out.insert(out.end(), packed.begin(), packed.end());
    return out;
}

Tables::Tables(Bytes payload, const Layout& layout)
    : Tables(BitReader(part(payload, 8, payload.size() < 8 ? 0 : payload.size() - 8)),
             checked_seen(payload, layout), layout) {}

Tables::Tables(BitReader in, uint32_t seen, const Layout& layout)
    : layout_(layout), grid_(Grid::of(layout.value_bits)), ranks_(in, layout.vocab_size, seen) {
    models_.push_back(Model::fit({}));
    for (uint16_t& model : model_of_) {
        const Model found = get_model(in);
        const bool trained = found.frequency[kEscape] != kTotal;
        model = trained ? uint16_t(models_.size()) : 0;
        if (trained) models_.push_back(found);
    }
    in.finish();
    for (const Model& model : models_) decoding_.emplace_back(model);
    values_before_ = layout.draws ? kValueKinds : grid_.top() + 1;
    for (int place = 0; place < kPlaces; ++place)
        for (uint32_t before = 0; before < values_before_; ++before) {
            const int kind = layout.draws ? int(before) : grid_.kind(before);
            value_models_.push_back(model_of_[next_value_context(place, kind)]);
        }
}

}  // namespace logit_codec

#include "tables.h"

#include <algorithm>
#include <numeric>

#include "block.h"
#include "buckets.h"

namespace logit_codec {
namespace {

using Histogram = std::array<double, 256>;

// Ranks of seen ids are cut where the buckets of ranks are: inside one, all ids are equally likely
// and so may be listed by number.  Calls visit(first rank, last rank + 1).
template <class Visit>
void for_each_rank_bucket(uint32_t seen, Visit&& visit) {
    for (uint32_t first = 0, symbol = 0; first < seen; ++symbol) {
        const uint32_t end = symbol + 1 < kSymbols ? bucket_named(symbol + 1).first : seen;
        visit(first, std::min(end, seen));
        first = end;
    }
}

// Bits of the low part of the gaps between `n` ids of a vocabulary (a Rice code).
int gap_bits(uint32_t vocab_size, uint32_t n) {
    const uint64_t mean = (uint64_t(vocab_size) * 177 / 256) / n;
    return mean ? log2_floor(uint32_t(mean)) : 0;
}

void put_unary(BitWriter& out, uint32_t number) {
    for (; number >= 16; number -= 16) out.put(0, 16);
    out.put(1u << number, int(number) + 1);
}

uint32_t get_unary(BitReader& in, uint32_t most) {
    for (uint32_t number = 0; number <= most; ++number)
        if (in.get(1)) return number;
    throw Corrupt("a gap between ids leads out of the vocabulary");
}

// The seen ids by falling count, those of a bucket by number; then the unseen by number.
std::vector<uint32_t> rank_ids(Span<const uint64_t> counts, uint32_t& seen) {
    std::vector<uint32_t> ids(counts.size());
    std::iota(ids.begin(), ids.end(), 0u);
    std::stable_sort(ids.begin(), ids.end(),
                     [&](uint32_t a, uint32_t b) { return counts[a] > counts[b]; });
    seen = uint32_t(std::partition_point(ids.begin(), ids.end(),
                                         [&](uint32_t id) { return counts[id] > 0; }) -
                    ids.begin());
    for_each_rank_bucket(seen, [&](uint32_t first, uint32_t end) {
        std::sort(ids.begin() + first, ids.begin() + end);
    });
    return ids;
}

std::vector<uint8_t> pack_ids(Span<const uint32_t> ids, uint32_t seen, uint32_t vocab_size) {
    BitWriter out;
    for_each_rank_bucket(seen, [&](uint32_t first, uint32_t end) {
        const int low = gap_bits(vocab_size, end - first);
        uint32_t next = 0;
        for (uint32_t rank = first; rank < end; ++rank) {
            const uint32_t gap = ids[rank] - next;
            put_unary(out, gap >> low);
            out.put(gap & ((1u << low) - 1), low);
            next = ids[rank] + 1;
        }
    });
    return out.finish();
}

std::vector<uint32_t> unpack_ids(Bytes bytes, uint32_t seen, uint32_t vocab_size) {
    BitReader in(bytes);
    std::vector<uint32_t> ids(vocab_size);
    std::vector<bool> taken(vocab_size);
    for_each_rank_bucket(seen, [&](uint32_t first, uint32_t end) {
        const int low = gap_bits(vocab_size, end - first);
        uint32_t next = 0;
        for (uint32_t rank = first; rank < end; ++rank) {
            const uint32_t high = get_unary(in, vocab_size >> low);
            const uint64_t id = next + (uint64_t(high) << low) + in.get(low);
            if (id >= vocab_size || taken[id]) throw Corrupt("the tables list an id wrongly");
            taken[id] = true;
            ids[rank] = uint32_t(id);
            next = uint32_t(id) + 1;
        }
    });
    in.finish();
    for (uint32_t id = 0, rank = seen; id < vocab_size; ++id)
        if (!taken[id]) ids[rank++] = id;
    return ids;
}

// Good and Turing: ids never seen so far will come as often as ids seen once did.
void add_unseen(Histogram& histogram, double mass, uint32_t seen, uint32_t vocab_size) {
    if (seen == vocab_size) return;
    for (uint32_t symbol = bucket_of(seen).symbol; symbol < kSymbols; ++symbol) {
        const uint64_t first = std::max(bucket_named(symbol).first, seen);
        const uint64_t end = symbol + 1 < kSymbols ? bucket_named(symbol + 1).first : vocab_size;
        const uint64_t last = std::min<uint64_t>(end, vocab_size);
        if (first < last) histogram[symbol] += mass * double(last - first) / (vocab_size - seen);
    }
}

void put_model(std::vector<uint8_t>& out, const Model& model) {
    out.push_back(uint8_t(256 - std::count(model.frequency.begin(), model.frequency.end(), 0)));
    for (int symbol = 0; symbol < 256; ++symbol) {
        if (!model.frequency[symbol]) continue;
        out.push_back(uint8_t(symbol));
        store(out, model.frequency[symbol]);
    }
}

Model get_model(Bytes bytes, size_t& at) {
    Model model;
    const int symbols = load<uint8_t>(bytes, at++);
    for (int i = 0, last = -1; i < symbols; ++i, at += 3) {
        const int symbol = load<uint8_t>(bytes, at);
        const auto frequency = load<uint16_t>(bytes, at + 1);
        if (symbol <= last || (symbol >= int(kSymbols) && symbol != int(kEscape)) ||
            frequency == 0 || frequency > kTotal)
            throw Corrupt("a model lists its symbols wrongly");
        model.frequency[symbol] = frequency;
        last = symbol;
    }
    model.place();
    if (!model.has(kEscape)) throw Corrupt("a model has no escape");
    return model;
}

std::vector<uint32_t> invert(Span<const uint32_t> id_of_rank) {
    std::vector<uint32_t> ranks(id_of_rank.size());
    for (uint32_t rank = 0; rank < id_of_rank.size(); ++rank) ranks[id_of_rank[rank]] = rank;
    return ranks;
}

}  // namespace

std::vector<uint8_t> Tables::train(const Layout& layout, Span<const uint64_t> id_counts,
                                   const Rows& sample) {
    uint32_t seen = 0;
    const std::vector<uint32_t> ids = rank_ids(id_counts, seen);
    const Grid& grid = Grid::of(layout.value_bits);
    const CodedRows coded = code_rows(layout, grid, invert(ids), sample);

    std::vector<Histogram> histograms(kContexts);
    std::vector<double> unseen(kIdContexts);
    for_each_number(layout, grid, coded, [&](int, int context, uint32_t number) {
        histograms[context][bucket_of(number).symbol] += 1;
        if (context < kIdContexts && number < seen && id_counts[ids[number]] == 1)
            unseen[context] += 1;
    });
    for (int context = 0; context < kIdContexts; ++context)
        add_unseen(histograms[context], unseen[context], seen, layout.vocab_size);

    std::vector<uint8_t> models;
    for (const Histogram& histogram : histograms) put_model(models, Model::fit(histogram));
    std::vector<uint8_t> out;
    store(out, layout.vocab_size);
    store(out, seen);
    store(out, uint32_t(models.size()));
    out.insert(out.end(), models.begin(), models.end());
    const std::vector<uint8_t> packed = pack_ids(ids, seen, layout.vocab_size);
    out.insert(out.end(), packed.begin(), packed.end());
    return out;
}

Tables::Tables(Bytes payload, const Layout& layout) : layout_(layout), grid_(Grid::of(layout.value_bits)) {
    const auto vocab_size = load<uint32_t>(payload, 0), seen = load<uint32_t>(payload, 4);
    const auto models_size = load<uint32_t>(payload, 8);
    if (vocab_size != layout.vocab_size || seen > vocab_size)
        throw Corrupt("the tables are of another vocabulary");
    const Bytes models = part(payload, 12, models_size);
    size_t at = 0;
    for (int context = 0; context < kContexts; ++context)
        models_.push_back(get_model(models, at));
    if (at != models.size()) throw Corrupt("the models do not fill their place");
    id_of_rank_ = unpack_ids(payload.subspan(12 + models_size), seen, vocab_size);

    append_slots(slots_, Model::fit({}));  // most contexts are untrained: one table does for them
    for (int context = 0; context < kContexts; ++context) {
        const bool trained = models_[context].frequency[kEscape] != kTotal;
        first_slot_[context] = trained ? uint32_t(slots_.size()) : 0;
        if (trained) append_slots(slots_, models_[context]);
    }
    for (uint32_t symbol = 0; symbol < kSymbols; ++symbol)
        after_symbol_[symbol] = first_slot_[id_context(bucket_named(symbol).first)];
    if (layout.draws) return;
    for (uint32_t code = 0; code < grid_.size(); ++code)
        after_code_.push_back({grid_.highest(code), first_slot_[next_value_context(layout, code)]});
}

std::vector<uint32_t> Tables::rank_of_id() const { return invert(id_of_rank_); }

}  // namespace logit_codec

#include "compact/symbol_stream.h"

#include <array>

namespace logit_codec {
namespace {

struct NamedBucket {
    uint32_t first, bits;
};

const auto kBuckets = [] {
    std::array<NamedBucket, kSymbols> buckets{};
    for (uint32_t symbol = 0; symbol < kSymbols; ++symbol) {
        const Bucket bucket = bucket_named(symbol);
        buckets[symbol] = {bucket.first, uint32_t(bucket.bits)};
    }
    return buckets;
}();

// Reads what write_numbers wrote, into arrays of known sizes.
class NumberReader {
   public:
    NumberReader(const Tables& tables, Bytes bytes)
        : tables_(tables),
          coded_(part(bytes, 4, load<uint32_t>(bytes, 0))),
          raw_(bytes.subspan(4 + load<uint32_t>(bytes, 0))) {}

    // The first rows, as many as `coded` has counts, of `rows`; returns how many entries they have.
    size_t read(size_t rows, CodedRows& coded) {
        uint32_t count = 0;
        size_t entry = 0;
        for (size_t row = 0; row < coded.counts.size(); ++row) {
            const auto ranks = Span<uint32_t>(coded.ranks).subspan(entry);
            const auto codes = Span<uint32_t>(coded.codes).subspan(entry);
            count = tables_.layout().draws ? sampled_row(ranks, codes)
                                           : top_row(count, ranks, codes, coded.tails[row]);
            coded.counts[row] = count;
            entry += count;
        }
        if (coded.counts.size() == rows) {
            if (entry != coded.ranks.size())
                throw Corrupt("the rows have fewer entries than their block");
            coded_.finish();
            raw_.finish();
        }
        return entry;
    }

   private:
    // A symbol of the alphabet, never the escape.
    template <int state>
    uint32_t symbol(uint32_t model) {
        uint32_t symbol = coded_.get<state>(tables_.decoding(model));
        if (symbol == kEscape) {
            symbol = raw_.get(8);
            if (symbol >= kSymbols) throw Corrupt("a symbol that does not exist");
        }
        return symbol;
    }

    uint32_t number_of(uint32_t symbol) {
        const NamedBucket bucket = kBuckets[symbol];
        return bucket.first + raw_.get(int(bucket.bits));
    }

    uint32_t value(uint32_t model) {
        const uint32_t found = symbol<1>(model);
        return found < kDirect ? found : number_of(found);  // most are; ids take either way
    }

    // A rank, counted from `from`.
    uint32_t rank(uint32_t model, uint32_t from) {
        const uint64_t found = uint64_t(from) + number_of(symbol<0>(model));
        if (found >= tables_.layout().vocab_size) throw Corrupt("a rank beyond the vocabulary");
        return uint32_t(found);
    }

    // Whether an entry is tied is as good as random, so it is computed with and not branched on.
    uint32_t rank_after(uint32_t rank_before, bool tied, uint32_t new_id_model) {
        const uint32_t if_tied = -uint32_t(tied);
        const uint32_t tied_model = tables_.model_of(tied_id_context(rank_before));
        const uint32_t model = new_id_model ^ ((new_id_model ^ tied_model) & if_tied);
        return rank(model, (rank_before + 1) & if_tied);
    }

    uint32_t top_row(uint32_t count_before, Span<uint32_t> ranks, Span<uint32_t> codes,
                     uint32_t& tail) {
        const Grid& grid = tables_.grid();
        const uint32_t count = value(tables_.model_of(count_context(count_before)));
        if (count > std::min<size_t>(ranks.size(), kMostEntriesOfARow))
            throw Corrupt("the rows have more entries than their block");
        tail = 0;
        if (count == 0) return 0;
        uint32_t code = grid.top();
        uint64_t weights = 0;
        const auto next_code = [&](uint32_t model) {
            const uint32_t below = value(model);
            if (below > code) throw Corrupt("a value below the grid");
            code -= below;
            weights += grid.weight(code);
            return code;
        };
        codes[0] = next_code(tables_.model_of(first_value_context(count)));
        ranks[0] = rank(tables_.model_of(kFirstIdContext), 0);
        for (uint32_t i = 1; i < count;) {
            const int place = place_of(i);
            const uint32_t new_id_model = tables_.model_of(new_id_context(place));
            const uint16_t* value_models = tables_.value_models(place);
            for (const uint32_t end = end_of_place(place, count); i < end; ++i) {
                codes[i] = next_code(value_models[code]);
                const bool tied = is_tied(i, codes[i], codes[i - 1]);
                ranks[i] = rank_after(ranks[i - 1], tied, new_id_model);
            }
        }
        const uint32_t likely = grid.likely_tail(weights);
        tail = unzigzag(value(tables_.model_of(tail_context(grid.kind(likely)))), likely);
        if (tail > grid.top()) throw Corrupt("a tail beyond the grid");
        return count;
    }

    uint32_t sampled_row(Span<uint32_t> ranks, Span<uint32_t> times) {
        uint32_t left = tables_.layout().draws, most = left, count = 0;
        for (; left; ++count) {
            const uint32_t i = count;
            const int place = i ? place_of(i) : 0;
            const uint32_t below =
                value(i ? tables_.value_models(place)[draws_kind(times[i - 1])]
                        : tables_.model_of(first_value_context(0)));
            if (below == most && i == 0) return 0;
            if (below >= most) throw Corrupt("an entry without draws");
            if (i == std::min<size_t>(ranks.size(), kMostEntriesOfARow))
                throw Corrupt("the rows have more entries than their block");
            times[i] = most - below;
            ranks[i] = i ? rank_after(ranks[i - 1], is_tied(i, times[i], times[i - 1]),
                                      tables_.model_of(new_id_context(place)))
                         : rank(tables_.model_of(kFirstIdContext), 0);
            left -= times[i];
            most = std::min(times[i], left);
        }
        return count;
    }

    const Tables& tables_;
    Decoder coded_;
    BitReader raw_;
};

}  // namespace

void check_size(uint64_t entries, Bytes stream, double entries_per_byte) {
    if (entries > (uint64_t(1) << 26) || double(entries) > double(stream.size()) * entries_per_byte)
        throw Corrupt("more entries than the block's bytes can hold");
}

std::vector<uint8_t> write_numbers(const Tables& tables, const CodedRows& rows) {
    struct Symbol {
        uint16_t context;
        uint8_t state, symbol;
    };
    std::vector<Symbol> symbols;
    BitWriter raw;
    for_each_number(tables.layout(), tables.grid(), rows, [&](int state, int context, uint32_t n) {
        const Bucket bucket = bucket_of(n);
        const bool known = tables.model(context).has(bucket.symbol);
        const uint32_t symbol = known ? bucket.symbol : kEscape;
        symbols.push_back({uint16_t(context), uint8_t(state), uint8_t(symbol)});
        if (!known) raw.put(bucket.symbol, 8);
        raw.put(n - bucket.first, bucket.bits);
    });
    Encoder encoder;
    for (size_t i = symbols.size(); i-- > 0;)
        encoder.put(symbols[i].state, tables.model(symbols[i].context), symbols[i].symbol);
    std::vector<uint8_t> out(4);
    encoder.finish(out);
    const uint32_t coded = uint32_t(out.size() - 4);
    std::memcpy(out.data(), &coded, 4);
    const std::vector<uint8_t> bits = raw.finish();
    out.insert(out.end(), bits.begin(), bits.end());
    return out;
}

CodedRows read_numbers(const Tables& tables, Bytes bytes, size_t rows, size_t entries,
                       size_t wanted) {
    check_size(entries, bytes, kCompactEntriesPerByte);
    CodedRows coded{std::vector<uint32_t>(wanted), std::vector<uint32_t>(wanted),
                    std::vector<uint32_t>(entries), std::vector<uint32_t>(entries)};
    const size_t read = NumberReader(tables, bytes).read(rows, coded);
    coded.ranks.resize(read);
    coded.codes.resize(read);
    return coded;
}

}  // namespace logit_codec

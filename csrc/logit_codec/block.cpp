#include "block.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "buckets.h"

namespace logit_codec {
namespace {

uint32_t draws_of(const Layout& layout, float logprob) {
    return uint32_t(std::lround(std::exp(double(logprob)) * layout.draws));
}

void check_row(const Layout& layout, Span<const int32_t> ids, Span<const float> logprobs,
               std::vector<int32_t>& sorted) {
    uint64_t draws = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || uint32_t(ids[i]) >= layout.vocab_size)
            throw BadRows("id " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                          std::to_string(layout.vocab_size));
        if (!std::isfinite(logprobs[i]) || logprobs[i] > 1e-3f)
            throw BadRows("log-probability " + std::to_string(logprobs[i]) +
                          " is not finite and at most 0");
        if (i && logprobs[i] > logprobs[i - 1])
            throw BadRows("the entries do not come by falling log-probability");
        if (layout.draws && draws_of(layout, logprobs[i]) == 0)
            throw BadRows("an entry of a sampled row has no draw");
        draws += draws_of(layout, logprobs[i]);
    }
    if (layout.draws && !ids.empty() && draws != layout.draws)
        throw BadRows("the draws sum to " + std::to_string(draws) + ", not to " +
                      std::to_string(layout.draws));
    sorted.assign(ids.begin(), ids.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) throw BadRows("id " + std::to_string(*twice) + " comes twice");
}

// Equal draws come by rank: their order says nothing, and sorted ranks need fewer bits.
void sort_ties(uint32_t count, uint32_t* ranks, const uint32_t* codes) {
    for (uint32_t begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && codes[end] == codes[begin];) ++end;
        std::sort(ranks + begin, ranks + end);
    }
}

std::vector<uint8_t> write_numbers(const Tables& tables, const CodedRows& rows) {
    struct Symbol {
        uint8_t state, context, symbol;
    };
    std::vector<Symbol> symbols;
    BitWriter raw;
    for_each_number(tables.layout(), tables.grid(), rows, [&](int state, int context, uint32_t n) {
        const Bucket bucket = bucket_of(n);
        const bool known = tables.model(context).has(bucket.symbol);
        symbols.push_back({uint8_t(state), uint8_t(context), known ? bucket.symbol : uint8_t(kEscape)});
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

    // The first counts.size() rows, of `rows`; returns how many entries they have.
    size_t read(size_t rows, Span<uint32_t> counts, Span<uint32_t> ranks, Span<uint32_t> codes) {
        const bool sampled = tables_.layout().draws != 0;
        uint32_t previous = 0;
        size_t entry = 0;
        for (uint32_t& count : counts) {
            const auto ranks_left = ranks.subspan(entry), codes_left = codes.subspan(entry);
            count = sampled ? sampled_row(ranks_left, codes_left)
                            : top_row(previous, ranks_left, codes_left);
            previous = count;
            entry += count;
        }
        if (counts.size() == rows) {
            if (entry != ranks.size())
                throw Corrupt("the rows have fewer entries than their block");
            coded_.finish();
            raw_.finish();
        }
        return entry;
    }

   private:
    // A symbol of the alphabet, never the escape.
    template <int state>
    uint32_t symbol(const uint32_t* slots) {
        uint32_t symbol = coded_.get<state>(slots);
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

    uint32_t value(const uint32_t* slots) {
        const uint32_t found = symbol<1>(slots);
        return found < kDirect ? found : number_of(found);  // most are; ids take either way
    }

    uint32_t id(int context) { return number_of(symbol<0>(tables_.slots(context))); }

    uint32_t checked_rank(uint64_t rank) const {
        if (rank >= tables_.layout().vocab_size) throw Corrupt("a rank beyond the vocabulary");
        return uint32_t(rank);
    }

    uint32_t top_row(uint32_t previous_count, Span<uint32_t> ranks, Span<uint32_t> codes) {
        const uint32_t count = value(
            tables_.slots(kCountContext + octave_context(previous_count, kCountContexts)));
        if (count > ranks.size()) throw Corrupt("the rows have more entries than their block");
        const uint32_t* id_slots = tables_.slots(0);
        const uint32_t* value_slots =
            tables_.slots(kFirstValueContext + octave_context(count, kFirstValueContexts));
        uint32_t most = tables_.grid().size() - 1;
        for (uint32_t i = 0; i < count; ++i) {
            const uint32_t below = value(value_slots);
            if (below > most) throw Corrupt("a value below the grid");
            codes[i] = most - below;
            const Tables::AfterCode& after = tables_.after_code(codes[i]);
            most = after.highest;
            value_slots = tables_.slots_from(after.first_slot);
            const uint32_t name = symbol<0>(id_slots);
            id_slots = tables_.slots_from(tables_.first_slot_after(name));
            ranks[i] = checked_rank(number_of(name));
        }
        return count;
    }

    uint32_t sampled_row(Span<uint32_t> ranks, Span<uint32_t> codes) {
        const Layout& layout = tables_.layout();
        uint32_t left = layout.draws, last = layout.draws, count = 0;
        while (left) {
            const int context =
                count ? next_value_context(layout, codes[count - 1]) : kFirstValueContext;
            const uint32_t most = std::min(last, left), below = value(tables_.slots(context));
            if (below == most && count == 0) return 0;
            if (below >= most) throw Corrupt("an entry without draws");
            if (count == ranks.size()) throw Corrupt("the rows have more entries than their block");
            codes[count] = most - below;
            if (count && codes[count] == last)
                ranks[count] = checked_rank(uint64_t(ranks[count - 1]) + 1 +
                                            id(id_context(ranks[count - 1])));
            else
                ranks[count] = checked_rank(id(0));
            left -= codes[count];
            last = codes[count++];
        }
        return count;
    }

    const Tables& tables_;
    Decoder coded_;
    BitReader raw_;
};

// The first `wanted` of a stream's rows.
CodedRows read_numbers(const Tables& tables, Bytes bytes, size_t rows, size_t entries,
                       size_t wanted) {
    check_size(entries, bytes, kCompactEntriesPerByte);
    CodedRows coded{std::vector<uint32_t>(wanted), std::vector<uint32_t>(entries),
                    std::vector<uint32_t>(entries)};
    const size_t read =
        NumberReader(tables, bytes).read(rows, coded.counts, coded.ranks, coded.codes);
    coded.ranks.resize(read);
    coded.codes.resize(read);
    return coded;
}

}  // namespace

void check_size(uint64_t entries, Bytes stream, double entries_per_byte) {
    if (entries > (uint64_t(1) << 26) || double(entries) > double(stream.size()) * entries_per_byte)
        throw Corrupt("more entries than the block's bytes can hold");
}

void check_rows(const Layout& layout, const Rows& rows) {
    std::vector<int32_t> scratch;
    size_t entry = 0;
    for (size_t row = 0; row < rows.counts.size(); ++row) {
        const auto count = size_t(rows.counts[row]);
        try {
            check_row(layout, rows.ids.subspan(entry, count), rows.logprobs.subspan(entry, count),
                      scratch);
        } catch (const BadRows& error) {
            throw BadRows("row " + std::to_string(row) + ": " + error.what());
        }
        entry += count;
    }
}

CodedRows code_rows(const Layout& layout, const Grid& grid, Span<const uint32_t> rank_of_id,
                    const Rows& rows) {
    CodedRows coded;
    coded.counts.assign(rows.counts.begin(), rows.counts.end());
    coded.ranks.reserve(rows.ids.size());
    for (const int32_t id : rows.ids) coded.ranks.push_back(rank_of_id[size_t(id)]);
    coded.codes.resize(rows.ids.size());
    std::vector<double> scratch;
    size_t entry = 0;
    for (const uint32_t count : coded.counts) {
        uint32_t* codes = coded.codes.data() + entry;
        if (layout.draws) {
            for (uint32_t i = 0; i < count; ++i)
                codes[i] = draws_of(layout, rows.logprobs[entry + i]);
            sort_ties(count, coded.ranks.data() + entry, codes);
        } else {
            grid.encode(rows.logprobs.data() + entry, count, codes, scratch);
        }
        entry += count;
    }
    return coded;
}

std::vector<uint8_t> encode_compact(const Tables& tables, Span<const uint32_t> rank_of_id,
                                    const Rows& rows) {
    return write_numbers(tables, code_rows(tables.layout(), tables.grid(), rank_of_id, rows));
}

void decode_compact(const Tables& tables, Bytes bytes, size_t rows, Span<int32_t> counts,
                    Span<int32_t> ids, Span<float> logprobs) {
    const CodedRows coded = read_numbers(tables, bytes, rows, ids.size(), counts.size());
    std::copy(coded.counts.begin(), coded.counts.end(), counts.begin());
    for (size_t i = 0; i < coded.ranks.size(); ++i) ids[i] = int32_t(tables.id(coded.ranks[i]));
    const uint32_t draws = tables.layout().draws;
    if (draws) {
        std::vector<float> table(draws + 1);
        for (uint32_t n = 1; n <= draws; ++n) table[n] = float(std::log(double(n) / draws));
        for (size_t i = 0; i < coded.codes.size(); ++i) logprobs[i] = table[coded.codes[i]];
        return;
    }
    size_t entry = 0;
    for (const uint32_t count : coded.counts) {
        tables.grid().decode(coded.codes.data() + entry, count, logprobs.data() + entry);
        entry += count;
    }
}

std::vector<uint8_t> slice_compact(const Tables& tables, Bytes bytes, uint32_t rows,
                                   uint32_t entries, uint32_t first_row, uint32_t row_count) {
    CodedRows coded = read_numbers(tables, bytes, rows, entries, rows);
    size_t begin = 0, size = 0;
    for (uint32_t row = 0; row < first_row; ++row) begin += coded.counts[row];
    for (uint32_t row = 0; row < row_count; ++row) size += coded.counts[first_row + row];
    const auto keep = [](std::vector<uint32_t>& numbers, size_t first, size_t n) {
        numbers = {numbers.begin() + first, numbers.begin() + first + n};
    };
    keep(coded.counts, first_row, row_count);
    keep(coded.ranks, begin, size);
    keep(coded.codes, begin, size);
    return write_numbers(tables, coded);
}

std::vector<uint8_t> encode_exact(const Rows& rows) {
    std::vector<uint8_t> out;
    out.reserve(4 * rows.counts.size() + 7 * rows.ids.size());
    for (const int32_t count : rows.counts) store(out, count);
    for (const int32_t id : rows.ids)
        for (int shift = 0; shift < 24; shift += 8) out.push_back(uint8_t(id >> shift));
    for (const float logprob : rows.logprobs) store(out, logprob);
    return out;
}

void decode_exact(Bytes bytes, const Layout& layout, Span<int32_t> counts,
                  Span<int32_t> ids, Span<float> logprobs) {
    if (bytes.size() != 4 * counts.size() + 7 * ids.size())
        throw Corrupt("an exact block has another size than its rows need");
    uint64_t entries = 0;
    load_all(bytes, 0, counts);
    for (const int32_t count : counts) {
        if (count < 0) throw Corrupt("a negative count");
        entries += uint64_t(count);
    }
    if (entries != ids.size()) throw Corrupt("the counts do not sum to the block's entries");
    const uint8_t* in = bytes.data() + counts.size_bytes();
    for (int32_t& id : ids) {
        id = in[0] | in[1] << 8 | in[2] << 16;
        if (uint32_t(id) >= layout.vocab_size) throw Corrupt("an id beyond the vocabulary");
        in += 3;
    }
    load_all(bytes, 4 * counts.size() + 3 * ids.size(), logprobs);
}

}  // namespace logit_codec

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

// No memory is taken for what a header claims before the size of its stream has borne it out: a
// symbol takes at least 1/1470 bits, for the escape has a frequency too.
constexpr uint64_t kMaxEntriesPerByte = 8 * 1024, kMaxEntries = 1 << 26;

void check_entries(uint64_t entries, Bytes stream) {
  const uint64_t most = std::min(kMaxEntries, stream.size() * kMaxEntriesPerByte);
  if (entries > most)
    refuse("its header says ", entries, " entries; a symbol stream of ", stream.size(),
           " bytes holds ", most, " at most");
}

// Reads what write_symbol_stream wrote, into arrays of known sizes.
class SymbolStreamReader {
 public:
  SymbolStreamReader(const EntropyModel& model, Bytes bytes)
      : model_(model),
        coded_(part(bytes, 4, load<uint32_t>(bytes, 0))),
        raw_(bytes.subspan(4 + load<uint32_t>(bytes, 0))) {}

  // The first rows, as many as `coded` has counts, of `rows`; returns how many entries they have.
  size_t read(size_t rows, CodedRows& coded) {
    uint32_t count = 0;
    size_t entry = 0;
    for (row_ = 0; row_ < coded.counts.size(); ++row_) {
      const auto ordinals = std::span<uint32_t>(coded.ordinals).subspan(entry);
      const auto codes = std::span<uint32_t>(coded.codes).subspan(entry);
      count = model_.layout().draws ? sampled_row(ordinals, codes)
                                    : top_row(count, ordinals, codes, coded.tails[row_]);
      coded.counts[row_] = count;
      entry += count;
    }
    if (coded.counts.size() == rows) {
      if (entry != coded.ordinals.size())
        refuse("its rows have ", entry, " entries, its header says ", coded.ordinals.size());
      coded_.finish();
      raw_.finish();
    }
    return entry;
  }

 private:
  // A symbol of the alphabet, never the escape.
  template <int state>
  uint32_t symbol(uint32_t model) {
    uint32_t symbol = coded_.get<state>(model_.decoding(model));
    if (symbol == kEscape) {
      symbol = raw_.get(8);
      if (symbol >= kSymbols)
        refuse("row ", row_, " escapes to symbol ", symbol, " before raw bit ", raw_.position(),
               "; there are ", kSymbols, " symbols");
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

  // An ordinal, counted from `from`.
  uint32_t ordinal(uint32_t model, uint32_t from) {
    const uint64_t found = uint64_t(from) + number_of(symbol<0>(model));
    if (found >= model_.layout().vocab_size)
      refuse("row ", row_, " has the id with ordinal ", found, " of a vocabulary of ",
             model_.layout().vocab_size);
    return uint32_t(found);
  }

  // Whether an entry is tied is as good as random, so it is computed with and not branched on.
  uint32_t ordinal_after(uint32_t ordinal_before, bool tied, uint32_t new_id_model) {
    const uint32_t if_tied = -uint32_t(tied);
    const uint32_t tied_model = model_.model_of(tied_id_context(ordinal_before));
    const uint32_t model = new_id_model ^ ((new_id_model ^ tied_model) & if_tied);
    return ordinal(model, (ordinal_before + 1) & if_tied);
  }

  void check_room(uint64_t count, size_t room) const {
    const size_t most = std::min<size_t>(room, kMaxEntriesOfARow);
    if (count > most)
      refuse("row ", row_, " has ", count, " entries or more; the rows before leave room for ",
             room, " of those that the header says, and a row has ", kMaxEntriesOfARow, " at most");
  }

  uint32_t top_row(uint32_t count_before, std::span<uint32_t> ordinals, std::span<uint32_t> codes,
                   uint32_t& tail) {
    const Quantizer& quantizer = model_.quantizer();
    const uint32_t count = value(model_.model_of(count_context(count_before)));
    check_room(count, ordinals.size());
    tail = 0;
    if (count == 0) return 0;
    uint32_t code = quantizer.max_code();
    uint64_t weights = 0;
    const auto next_code = [&](uint32_t model) {
      const uint32_t below = value(model);
      if (below > code)
        refuse("row ", row_, " has a code that is ", below, " below ", code, "; the smallest is 0");
      code -= below;
      weights += quantizer.weight(code);
      return code;
    };
    codes[0] = next_code(model_.model_of(first_value_context(count)));
    ordinals[0] = ordinal(model_.model_of(kFirstIdContext), 0);
    for (uint32_t i = 1; i < count;) {
      const int place = place_of(i);
      const uint32_t new_id_model = model_.model_of(new_id_context(place));
      const uint16_t* value_models = model_.value_models(place);
      for (const uint32_t end = end_of_place(place, count); i < end; ++i) {
        codes[i] = next_code(value_models[code]);
        const bool tied = is_tied(i, codes[i], codes[i - 1]);
        ordinals[i] = ordinal_after(ordinals[i - 1], tied, new_id_model);
      }
    }
    const uint32_t likely = quantizer.likely_tail(weights);
    tail = unzigzag(value(model_.model_of(tail_context(quantizer.kind(likely)))), likely);
    if (tail > quantizer.max_code())
      refuse("row ", row_, " has a tail of code ", tail, "; the largest is ", quantizer.max_code());
    return count;
  }

  uint32_t sampled_row(std::span<uint32_t> ordinals, std::span<uint32_t> times) {
    uint32_t left = model_.layout().draws, most = left, count = 0;
    for (; left; ++count) {
      const uint32_t i = count;
      const int place = i ? place_of(i) : 0;
      const uint32_t below = value(i ? model_.value_models(place)[draws_kind(times[i - 1])]
                                     : model_.model_of(first_value_context(0)));
      if (below == most && i == 0) return 0;
      if (below >= most)
        refuse("row ", row_, ", entry ", i, " has ", below, " draws less than ", most,
               "; an entry has 1 draw or more");
      check_room(i + 1, ordinals.size());
      times[i] = most - below;
      ordinals[i] = i ? ordinal_after(ordinals[i - 1], is_tied(i, times[i], times[i - 1]),
                                      model_.model_of(new_id_context(place)))
                      : ordinal(model_.model_of(kFirstIdContext), 0);
      left -= times[i];
      most = std::min(times[i], left);
    }
    return count;
  }

  const EntropyModel& model_;
  Decoder coded_;
  BitReader raw_;
  size_t row_ = 0;
};

}  // namespace

std::vector<uint8_t> write_symbol_stream(const EntropyModel& model, const CodedRows& rows) {
  struct Symbol {
    uint16_t context;
    uint8_t state, symbol;
  };
  std::vector<Symbol> symbols;
  BitWriter raw;
  const auto put = [&](int state, int context, uint32_t number) {
    const Bucket bucket = bucket_of(number);
    const bool known = model.model(context).has(bucket.symbol);
    const uint32_t symbol = known ? bucket.symbol : kEscape;
    symbols.push_back({uint16_t(context), uint8_t(state), uint8_t(symbol)});
    if (!known) raw.put(bucket.symbol, 8);
    raw.put(number - bucket.first, bucket.bits);
  };
  for_each_number(model.layout(), model.quantizer(), rows, put);
  Encoder encoder;
  for (size_t i = symbols.size(); i-- > 0;)
    encoder.put(symbols[i].state, model.model(symbols[i].context), symbols[i].symbol);
  std::vector<uint8_t> out(4);
  encoder.finish(out);
  const uint32_t coded = uint32_t(out.size() - 4);
  std::memcpy(out.data(), &coded, 4);
  const std::vector<uint8_t> bits = raw.finish();
  out.insert(out.end(), bits.begin(), bits.end());
  return out;
}

CodedRows read_symbol_stream(const EntropyModel& model, Bytes stream, size_t rows, size_t entries,
                             size_t wanted) {
  check_entries(entries, stream);
  CodedRows coded{std::vector<uint32_t>(wanted), std::vector<uint32_t>(wanted),
                  std::vector<uint32_t>(entries), std::vector<uint32_t>(entries)};
  const size_t read = SymbolStreamReader(model, stream).read(rows, coded);
  coded.ordinals.resize(read);
  coded.codes.resize(read);
  return coded;
}

}  // namespace logit_codec

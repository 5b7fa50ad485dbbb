// The tables that blocks of the `compact` codec are coded with: which id has which rank, and a
// model for every context.  Trained on rows already seen, kept in the shard in a frame of their own.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "buckets.h"
#include "bytes.h"
#include "grid.h"
#include "rans.h"

namespace logit_codec {

// What a shard's header says about its rows.
struct Layout {
    uint32_t vocab_size;
    uint32_t draws;  // 0: top rows
    int value_bits;
};

// Rows without padding.
struct Rows {
    Span<const int32_t> counts;
    Span<const int32_t> ids;
    Span<const float> logprobs;
};

// Rows as the numbers that are entropy-coded: ranks instead of ids, and codes of the grid (top
// rows) or draws (sampled rows) instead of log-probabilities.
struct CodedRows {
    std::vector<uint32_t> counts, ranks, codes;
};

// Contexts of the models, one after another.
inline constexpr int kIdContexts = 2 + kMaxNumberLog2, kCountContexts = 8;
inline constexpr int kFirstValueContexts = 8, kNextValueContexts = 48;
inline constexpr int kCountContext = kIdContexts;
inline constexpr int kFirstValueContext = kCountContext + kCountContexts;
inline constexpr int kNextValueContext = kFirstValueContext + kFirstValueContexts;
inline constexpr int kContexts = kNextValueContext + kNextValueContexts;

inline int octave_context(uint32_t number, int contexts) {
    return std::min(bit_width(number), contexts - 1);
}

// Of the id after one of rank `rank` in its row (or its run of equal draws); 0 is the first one's.
// The octave of a number follows from its symbol, so a decoder needs no more to go on.
inline int id_context(uint32_t rank) { return 1 + octave_context(rank, kIdContexts - 1); }

inline int next_value_context(const Layout& layout, uint32_t code) {
    const uint32_t nat = layout.draws ? code : (code * kNextValueContexts) >> layout.value_bits;
    return kNextValueContext + int(std::min<uint32_t>(nat, kNextValueContexts - 1));
}

class Tables {
   public:
    Tables(Bytes payload, const Layout& layout);

    // Payload of a tables frame.  id_counts: how often each id was seen so far; rows: a sample.
    static std::vector<uint8_t> train(const Layout& layout, Span<const uint64_t> id_counts,
                                      const Rows& sample);

    const Layout& layout() const { return layout_; }
    const Grid& grid() const { return grid_; }
    uint32_t id(uint32_t rank) const { return id_of_rank_[rank]; }
    const Model& model(int context) const { return models_[context]; }
    const uint32_t* slots(int context) const { return slots_.data() + first_slot_[context]; }

    // Where a decoder goes on after a value's code, or after an id's symbol.
    struct AfterCode {
        uint32_t highest, first_slot;
    };
    const AfterCode& after_code(uint32_t code) const { return after_code_[code]; }
    uint32_t first_slot_after(uint32_t symbol) const { return after_symbol_[symbol]; }
    const uint32_t* slots_from(uint32_t first_slot) const { return slots_.data() + first_slot; }
    std::vector<uint32_t> rank_of_id() const;
    size_t bytes() const { return 4 * (id_of_rank_.size() + slots_.size()) + sizeof(*this); }

   private:
    Layout layout_;
    const Grid& grid_;
    std::vector<uint32_t> id_of_rank_;
    std::vector<Model> models_;
    std::vector<uint32_t> slots_;
    std::array<uint32_t, kContexts> first_slot_;
    std::array<uint32_t, kSymbols> after_symbol_;
    std::vector<AfterCode> after_code_;
};

}  // namespace logit_codec

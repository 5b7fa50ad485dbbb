// Log-probabilities as whole numbers.
//
// A row's probabilities p_1 >= p_2 >= ... break a stick of length 1: p_i is the fraction f_i of
// what the stronger entries left, R_i = 1 - p_1 - ... - p_{i-1}.  The code of an entry is the
// log-odds of f_i, rounded to a grid of step 48 / 2^bits from -30 on.  The divergence of the
// decoded row from the given one, its tail (the mass of no entry) included, is by the chain rule
//
//     KL = sum_i R_i KL(f_i || decoded f_i) <= step^2 / 8 * sum_i p_i (1 - f_i),
//
// so no row, however peaked or flat, is worse than step^2 / 8 (2.8e-4 nats at 10 bits), decoded
// masses never exceed 1, and the tail is kept to the same relative precision as an entry.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace logit_codec {

inline constexpr int kMinValueBits = 8, kMaxValueBits = 14;

class Grid {
   public:
    // The grid of kMinValueBits <= bits <= kMaxValueBits, made once.
    static const Grid& of(int bits) {
        static const std::vector<Grid> grids = [] {
            std::vector<Grid> made;
            for (int b = kMinValueBits; b <= kMaxValueBits; ++b) made.push_back(Grid(b));
            return made;
        }();
        return grids[size_t(bits - kMinValueBits)];
    }

    uint32_t size() const { return size_; }

    // Codes of one row of n falling log-probabilities.  `rest` is scratch.
    void encode(const float* logprobs, uint32_t n, uint32_t* codes, std::vector<double>& rest) const {
        remaining(logprobs, n, rest);
        for (uint32_t i = 0; i < n; ++i) {
            const double odds = rest[i] > 0 ? double(logprobs[i]) - std::log(rest[i]) : 1e9;
            const double place = std::clamp((odds + 30) / step_ + 0.5, 0.0, double(size_ - 1));
            codes[i] = std::min(uint32_t(place), i ? highest_[codes[i - 1]] : size_ - 1);
        }
    }

    // Rounding may have put neighbours out of order by a step; they are put back in order.
    void decode(const uint32_t* codes, uint32_t n, float* logprobs) const {
        double rest = 0;
        uint32_t moves = 0;
        for (uint32_t i = 0; i < n; ++i) {
            const auto value = float(rest + log_f_[codes[i]]);
            rest += log_rest_[codes[i]];
            uint32_t place = i;
            if (moves < kManyMoves * n)
                for (; place && logprobs[place - 1] < value; --place, ++moves)
                    logprobs[place] = logprobs[place - 1];
            logprobs[place] = value;
        }
        if (moves >= kManyMoves * n) std::sort(logprobs, logprobs + n, std::greater<>());
    }

    // The largest code that can follow `code`, since p_i <= p_{i-1} means f_i <= f_{i-1} / (1 -
    // f_{i-1}).
    uint32_t highest(uint32_t code) const { return highest_[code]; }

   private:
    explicit Grid(int bits)
        : size_(1u << bits), step_(48.0 / size_), log_f_(size_), log_rest_(size_), highest_(size_) {
        for (uint32_t code = 0; code < size_; ++code) {
            const double odds = odds_of(code);
            log_f_[code] = -std::log1p(std::exp(-odds));
            log_rest_[code] = -std::log1p(std::exp(odds));
            highest_[code] = highest_after(odds + step_ / 2);
        }
    }

    double odds_of(uint32_t code) const { return code * step_ - 30; }

    uint32_t highest_after(double odds) const {
        if (odds >= 0) return size_ - 1;
        const double next = odds - std::log(-std::expm1(odds));  // log-odds of exp(odds)
        return std::min(uint32_t(std::ceil((next + 30) / step_)), size_ - 1);
    }

    // rest[i] = what entry i leaves.  Float32 rounding of the teacher can make the sum exceed 1;
    // then what is left is what the later entries need.
    static void remaining(const float* logprobs, uint32_t n, std::vector<double>& rest) {
        rest.resize(n);
        double after = 0;
        for (uint32_t i = n; i-- > 0;) {
            rest[i] = after;
            after += std::exp(double(logprobs[i]));
        }
        double left = 1;
        for (uint32_t i = 0; i < n; ++i) {
            left -= std::exp(double(logprobs[i]));
            rest[i] = std::max(rest[i], left);
        }
    }

    static constexpr uint32_t kManyMoves = 8;  // per entry: only hostile rows need more

    uint32_t size_;
    double step_;
    std::vector<double> log_f_, log_rest_;
    std::vector<uint32_t> highest_;
};

}  // namespace logit_codec

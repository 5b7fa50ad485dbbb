// The loops of rows.h, written with the compiler's vector types and included once per
// instruction set (MEGATRON_PD_ISA names it, MEGATRON_PD_VECTOR_BYTES is its register width).
//
// Everything is in an unnamed namespace and no standard template is used: an inline function shared
// between the files could otherwise be linked in its AVX-512 form into the baseline.
//
// The unit of work is a pair of registers of float32. 16-bit logits are read as 32-bit words, whose
// low and high halves make the pair: the order of logits within a unit is of no consequence here,
// and so no lane-crossing shuffle is needed.
#pragma once

#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "rows.h"

namespace megatron_pd {
namespace {

typedef float Floats __attribute__((vector_size(MEGATRON_PD_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(MEGATRON_PD_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(MEGATRON_PD_VECTOR_BYTES)));

constexpr int64_t kLanes = MEGATRON_PD_VECTOR_BYTES / 4;
constexpr int64_t kUnit = 2 * kLanes;
// Logits per block: its maximum is taken first, then its exponentials, the second time from the
// first-level cache, so that main memory is read once. Each lane adds up 128 float32 numbers, on
// every instruction set, before the sums are put together in float64.
constexpr int64_t kBlock = 128 * kUnit;

#define MEGATRON_PD_INLINE inline __attribute__((always_inline))

MEGATRON_PD_INLINE Floats broadcast(float x) { return x - Floats{}; }
MEGATRON_PD_INLINE Floats as_floats(Words x) { return reinterpret_cast<Floats>(x); }
MEGATRON_PD_INLINE Words as_words(Floats x) { return reinterpret_cast<Words>(x); }

// Takes b where either is NaN: a NaN logit then reaches the sum instead of hiding in the maximum.
MEGATRON_PD_INLINE Floats max_of(Floats a, Floats b) { return a > b ? a : b; }

struct Pair {
  Floats first, second;
};

// --- the three storage types ---------------------------------------------------------------------

struct Float32 {
  using Storage = uint32_t;
  static constexpr Storage kMinusInfinity = 0xff800000u;

  static MEGATRON_PD_INLINE Pair load(const Storage* from) {
    Pair pair;
    std::memcpy(&pair.first, from, sizeof pair.first);
    std::memcpy(&pair.second, from + kLanes, sizeof pair.second);
    return pair;
  }
  static MEGATRON_PD_INLINE void store(Pair pair, Storage* to) {
    std::memcpy(to, &pair.first, sizeof pair.first);
    std::memcpy(to + kLanes, &pair.second, sizeof pair.second);
  }
  // Where in a unit a lane of the first or the second register comes from.
  static MEGATRON_PD_INLINE int64_t place(int64_t lane, int64_t half) {
    return half * kLanes + lane;
  }
};

template <class Half>
struct Packed16 {
  using Storage = uint16_t;

  static MEGATRON_PD_INLINE Pair load(const Storage* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {Half::widen(words << 16), Half::widen(words & 0xffff0000u)};
  }
  static MEGATRON_PD_INLINE void store(Pair pair, Storage* to) {
    const Words words = (Half::narrow(pair.first) >> 16) | Half::narrow(pair.second);
    std::memcpy(to, &words, sizeof words);
  }
  static MEGATRON_PD_INLINE int64_t place(int64_t lane, int64_t half) { return 2 * lane + half; }
};

// Both convert between float32 and a 16-bit number in the upper half of the word.
struct BFloat16 : Packed16<BFloat16> {
  static constexpr Storage kMinusInfinity = 0xff80u;

  static MEGATRON_PD_INLINE Floats widen(Words upper) { return as_floats(upper); }
#if defined(__AVX512BF16__)
  // The instruction rounds as below, but gives 0 for bfloat16's subnormal numbers, below 1e-38.
  static MEGATRON_PD_INLINE void store(Pair pair, Storage* to) {
    const Words words = narrow_to_low(pair.first) | (narrow_to_low(pair.second) << 16);
    std::memcpy(to, &words, sizeof words);
  }
  static MEGATRON_PD_INLINE Words narrow_to_low(Floats x) {
    return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
#else
  static MEGATRON_PD_INLINE Words narrow(Floats x) {
    const Words bits = as_words(x);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);    // to nearest, ties to even
    return (x == x ? rounded : bits | 0x00400000u) & 0xffff0000u;  // a NaN's payload must not carry
  }
#endif
};

struct Float16 : Packed16<Float16> {
  static constexpr Storage kMinusInfinity = 0xfc00u;

  static MEGATRON_PD_INLINE Floats widen(Words upper) {
    const Words sign = upper & 0x80000000u;
    const Words magnitude = (upper & 0x7fff0000u) >> 3;
    // Read with float32's exponent bias the value is 2^112 too small, for subnormals as well.
    const Floats scaled = as_floats(magnitude) * 0x1p112f;
    const Words finite = as_words(scaled);
    const Words special = magnitude | 0x7f800000u;  // infinities and NaN
    return as_floats(sign | (magnitude >= 0x0f800000u ? special : finite));
  }
  static MEGATRON_PD_INLINE Words narrow(Floats x) {
    const Words bits = as_words(x);
    const Words sign = bits & 0x80000000u;
    const Words magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent and round 13 bits away, to nearest, ties to even.
    const Words normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 lets the float32 adder round at 2^-24.
    const Words subnormal = as_words(as_floats(magnitude) + 0.5f) - 0x3f000000u;
    Words half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? half * 0u + 0x7c00u : half;  // rounds beyond 65504
    half = magnitude > 0x7f800000u ? half * 0u + 0x7e00u : half;   // NaN
    return sign | (half << 16);
  }
};

// Columns beyond the last whole unit, in a buffer of one unit filled up with −inf.
template <class Type>
struct Tail {
  typename Type::Storage values[kUnit];

  MEGATRON_PD_INLINE Tail(const typename Type::Storage* from, int64_t count) {
    for (int64_t i = 0; i < kUnit; ++i) values[i] = i < count ? from[i] : Type::kMinusInfinity;
  }
};

// --- exp((z − max)/temperature) ------------------------------------------------------------------

// 2^x on [−1/2, 1/2] as a minimax polynomial: relative error 7.5e-8.
constexpr float kExp2[] = {0x1.000002p+0f, 0x1.62e428p-1f, 0x1.ebf918p-3f,
                           0x1.c6b6e4p-5f, 0x1.3d0c52p-7f, 0x1.5c08e4p-10f};

struct Exponential {
  float max;
  float scale;      // log2(e)/temperature
  float underflow;  // z − max below this gives 0: 2^-125, where float32's exponent ends

  // A row of −inf alone has no maximum to subtract: all its exponentials are 0.
  MEGATRON_PD_INLINE Exponential(float row_max, float temperature)
      : max(row_max == -__builtin_inff() ? 0.0f : row_max),
        scale(static_cast<float>(0x1.71547652b82fep+0 / temperature)),
        underflow(-125.0f / scale) {}

  MEGATRON_PD_INLINE Floats operator()(Floats z) const {
    const Floats shifted = z - max;
    // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
    const Floats magic = shifted * scale + 0x1.8p23f;
    const Floats whole = magic - 0x1.8p23f;
    const Floats part = shifted * scale - whole;
    Floats power = broadcast(kExp2[5]);
    for (int i = 4; i >= 0; --i) power = power * part + kExp2[i];
    const Floats scaled = as_floats(as_words(power) + (as_words(magic) << 23));
    return shifted < underflow ? Floats{} : scaled;  // false for NaN, which passes through
  }
};

MEGATRON_PD_INLINE float reduce_max(Floats x) {
  float result = x[0];
  for (int64_t i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

MEGATRON_PD_INLINE double reduce_sum(Floats x) {
  double result = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) result += x[i];
  return result;
}

// --- the loops -----------------------------------------------------------------------------------

template <class Type>
MEGATRON_PD_INLINE float block_max(const typename Type::Storage* logits, int64_t count) {
  Floats first = broadcast(-__builtin_inff()), second = first;
  int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) {
    const Pair z = Type::load(logits + i);
    first = max_of(z.first, first);
    second = max_of(z.second, second);
  }
  if (i < count) {
    const Pair z = Type::load(Tail<Type>(logits + i, count - i).values);
    first = max_of(z.first, first);
    second = max_of(z.second, second);
  }
  return reduce_max(max_of(first, second));
}

template <class Type>
MEGATRON_PD_INLINE double block_sum(const typename Type::Storage* logits, int64_t count,
                                    Exponential exponential) {
  Floats first{}, second{};
  int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) {
    const Pair z = Type::load(logits + i);
    first += exponential(z.first);
    second += exponential(z.second);
  }
  if (i < count) {
    const Pair z = Type::load(Tail<Type>(logits + i, count - i).values);
    first += exponential(z.first);
    second += exponential(z.second);
  }
  return reduce_sum(first + second);
}

template <class Type>
void statistics(const void* row, int64_t count, const float* temperatures, int64_t each,
                float* row_max, double* sums) {
  const auto* logits = static_cast<const typename Type::Storage*>(row);
  float max = -__builtin_inff();
  for (int64_t n = 0; n < each; ++n) sums[n] = 0.0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    const float raised = block_max<Type>(logits + start, length);
    if (raised > max) {
      // Online softmax: what was summed so far is relative to the old maximum. Nothing but zeros
      // (or a NaN, which must stay) was summed while that was −inf.
      for (int64_t n = 0; n < each && max != -__builtin_inff(); ++n)
        sums[n] *= __builtin_exp((double(max) - raised) / temperatures[n]);
      max = raised;
    }
    for (int64_t n = 0; n < each; ++n)
      sums[n] += block_sum<Type>(logits + start, length, Exponential(max, temperatures[n]));
  }
  *row_max = max;
}

struct OneTerm {
  Exponential exponential;
  float factor;

  MEGATRON_PD_INLINE OneTerm(float max, DenseTerm<float> term)
      : exponential(max, term.temperature), factor(-term.coefficient) {}
  MEGATRON_PD_INLINE Floats operator()(Floats z) const { return exponential(z) * factor; }
};

struct TwoTerms {
  OneTerm first, second;

  MEGATRON_PD_INLINE Floats operator()(Floats z) const { return first(z) + second(z); }
};

template <class Type, class Terms>
MEGATRON_PD_INLINE void map_row(const void* row, void* out, int64_t count, Terms terms) {
  const auto* logits = static_cast<const typename Type::Storage*>(row);
  auto* gradients = static_cast<typename Type::Storage*>(out);
  int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) {
    const Pair z = Type::load(logits + i);
    Type::store({terms(z.first), terms(z.second)}, gradients + i);
  }
  if (i < count) {
    Tail<Type> tail(logits + i, count - i);
    const Pair z = Type::load(tail.values);
    Type::store({terms(z.first), terms(z.second)}, tail.values);
    std::memcpy(gradients + i, tail.values, (count - i) * sizeof tail.values[0]);
  }
}

template <class Type>
void gradient(const void* row, void* out, int64_t count, float max, const DenseTerm<float>* terms,
              int64_t each) {
  if (each == 1)
    map_row<Type>(row, out, count, OneTerm(max, terms[0]));
  else
    map_row<Type>(row, out, count, TwoTerms{OneTerm(max, terms[0]), OneTerm(max, terms[1])});
}

template <class Type>
void maxima(const void* row, int64_t count, int64_t group, float* out) {
  const auto* logits = static_cast<const typename Type::Storage*>(row);
  for (int64_t start = 0; start < count; start += group)
    *out++ = block_max<Type>(logits + start, count - start < group ? count - start : group);
}

// The last, partial unit, filled up with `filler`.
template <class Type>
MEGATRON_PD_INLINE Pair load_tail(const typename Type::Storage* from, int64_t count, float filler) {
  Pair z = Type::load(Tail<Type>(from, count).values);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (Type::place(lane, 0) >= count) z.first[lane] = filler;
    if (Type::place(lane, 1) >= count) z.second[lane] = filler;
  }
  return z;
}

// Σ term(z) of a block, where term(filler) is 0.
template <class Type, class Term>
MEGATRON_PD_INLINE double block_sum_of(const typename Type::Storage* logits, int64_t count,
                                       float filler, Term term) {
  Floats first{}, second{};
  int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) {
    const Pair z = Type::load(logits + i);
    first += term(z.first);
    second += term(z.second);
  }
  if (i < count) {
    const Pair z = load_tail<Type>(logits + i, count - i, filler);
    first += term(z.first);
    second += term(z.second);
  }
  return reduce_sum(first + second);
}

// Each block gives its mean and the squares around it, and they are put together as Chan, Golub and
// LeVeque (1983) do, so that large log-probs that differ by little lose no digits.
template <class Type>
void log_prob_sums(const void* row, int64_t count, float lse, double* sums) {
  const auto* logits = static_cast<const typename Type::Storage*>(row);
  const Exponential exponential(lse, 1.0f);
  const auto value = [](Floats z) { return z; };
  const auto plogp = [&](Floats z) {
    const Floats p = exponential(z);
    return p == 0.0f ? Floats{} : p * (z - lse);
  };
  double total_plogp = 0.0, mean = 0.0, squares = 0.0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    const auto* block = logits + start;
    const auto center = static_cast<float>(block_sum_of<Type>(block, length, 0.0f, value) / length);
    const auto deviation = [&](Floats z) { return z - center; };
    const auto square = [&](Floats z) { return (z - center) * (z - center); };
    const double rest = block_sum_of<Type>(block, length, center, deviation) / length;
    const double rise = center + rest - lse - mean;
    const double share = double(length) / double(start + length);
    squares += block_sum_of<Type>(block, length, center, square) - rest * rest * length;
    squares += rise * rise * start * share;
    mean += rise * share;
    total_plogp += block_sum_of<Type>(block, length, -__builtin_inff(), plogp);
  }
  const bool is_finite = mean - mean == 0.0;
  sums[0] = total_plogp;
  sums[1] = is_finite ? mean * count : -__builtin_inf();
  sums[2] = is_finite ? squares + mean * mean * count : __builtin_inf();
}

MEGATRON_PD_INLINE bool any(Ints mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

template <class Type>
int64_t candidates(const void* row, int64_t begin, int64_t end, float threshold,
                   Candidate<float>* out) {
  const auto* logits = static_cast<const typename Type::Storage*>(row);
  int64_t found = 0;
  for (int64_t i = begin; i < end; i += kUnit) {
    const int64_t length = end - i < kUnit ? end - i : kUnit;
    const Pair z = Type::load(length == kUnit ? logits + i : Tail<Type>(logits + i, length).values);
    if (!any((z.first >= threshold) | (z.second >= threshold))) continue;
    for (int64_t half = 0; half < 2; ++half) {
      const Floats values = half == 0 ? z.first : z.second;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t place = Type::place(lane, half);
        if (values[lane] >= threshold && place < length)
          out[found++] = {values[lane], static_cast<int32_t>(i + place)};
      }
    }
  }
  return found;
}

template <class Type>
RowKernels kernels() {
  return {statistics<Type>, gradient<Type>, maxima<Type>, candidates<Type>, log_prob_sums<Type>};
}

}  // namespace

#define MEGATRON_PD_CONCAT_(a, b) a##b
#define MEGATRON_PD_CONCAT(a, b) MEGATRON_PD_CONCAT_(a, b)

RowKernels MEGATRON_PD_CONCAT(row_kernels_, MEGATRON_PD_ISA)(LogitType type) {
  switch (type) {
    case LogitType::kBFloat16:
      return kernels<BFloat16>();
    case LogitType::kFloat16:
      return kernels<Float16>();
    default:
      return kernels<Float32>();
  }
}

}  // namespace megatron_pd

// Which ids come together in rows, and the classes of rows that this makes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace logit_codec {

// Pairs (a row's first number, another number of the row), by first.
struct CoOccurrences {
  std::vector<uint32_t> begin;   // [firsts + 1], into `others`
  std::vector<uint32_t> others;  // each below `numbers`
  uint32_t numbers;

  size_t firsts() const { return begin.size() - 1; }
};

struct Classes {
  std::vector<uint8_t> of_first;  // [firsts]
  std::vector<uint32_t> counts;   // [classes, numbers]: how often a number came in its rows
};

// Divides firsts into classes whose rows have different numbers: hard expectation-maximization of a
// mixture of multinomials.
Classes find_classes(const CoOccurrences& pairs, uint32_t classes);

}  // namespace logit_codec

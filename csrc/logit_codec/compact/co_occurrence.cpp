#include "compact/co_occurrence.h"

#include <algorithm>
#include <cmath>

namespace logit_codec {
namespace {

constexpr int kRounds = 8;
constexpr float kPrior = 3000;  // numbers of all rows that every class is taken to have seen

std::vector<uint32_t> count_by_class(const CoOccurrences& pairs,
                                     const std::vector<uint8_t>& of_first, uint32_t classes) {
  std::vector<uint32_t> counts(size_t(classes) * pairs.numbers);
  for (size_t first = 0; first < pairs.firsts(); ++first) {
    uint32_t* count = counts.data() + size_t(of_first[first]) * pairs.numbers;
    for (uint32_t i = pairs.begin[first]; i < pairs.begin[first + 1]; ++i) ++count[pairs.others[i]];
  }
  return counts;
}

// [numbers, classes]: so that the classes of one number lie side by side.
std::vector<float> log_likelihoods(const std::vector<uint32_t>& counts, uint32_t numbers,
                                   uint32_t classes) {
  std::vector<float> everywhere(numbers, 0.1f), total(classes, kPrior);
  float all = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    everywhere[i % numbers] += float(counts[i]);
    total[i / numbers] += float(counts[i]);
  }
  for (const float count : everywhere) all += count;
  std::vector<float> logs(counts.size());
  for (uint32_t c = 0; c < classes; ++c)
    for (uint32_t n = 0; n < numbers; ++n)
      logs[size_t(n) * classes + c] = std::log(
          (float(counts[size_t(c) * numbers + n]) + kPrior * everywhere[n] / all) / total[c]);
  return logs;
}

}  // namespace

Classes find_classes(const CoOccurrences& pairs, uint32_t classes) {
  std::vector<uint8_t> of_first(pairs.firsts());
  for (size_t first = 0; first < of_first.size(); ++first)
    of_first[first] = uint8_t(first % classes);
  std::vector<float> score(classes);
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<float> logs =
        log_likelihoods(count_by_class(pairs, of_first, classes), pairs.numbers, classes);
    for (size_t first = 0; first < pairs.firsts(); ++first) {
      std::fill(score.begin(), score.end(), 0.0f);
      for (uint32_t i = pairs.begin[first]; i < pairs.begin[first + 1]; ++i) {
        const float* log = logs.data() + size_t(pairs.others[i]) * classes;
        for (uint32_t c = 0; c < classes; ++c) score[c] += log[c];
      }
      of_first[first] = uint8_t(std::max_element(score.begin(), score.end()) - score.begin());
    }
  }
  return {of_first, count_by_class(pairs, of_first, classes)};
}

}  // namespace logit_codec

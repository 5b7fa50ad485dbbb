// Hostile bytes: mutated entropy models, blocks and whole shards, their checksums made right again,
// so that every bounds check is reached.  Each input must end in Corrupt or in rows whose ids are
// in range.
//
//     fuzz_codec INPUTS SEED

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "compact/codec.h"
#include "container/shard.h"
#include "exact/codec.h"

using namespace logit_codec;

namespace {

std::mt19937_64 rng;

uint64_t below(uint64_t n) { return n ? rng() % n : 0; }

RowBuffers random_rows(const Layout& layout, size_t rows) {
  RowBuffers out;
  for (size_t row = 0; row < rows; ++row) {
    const uint32_t most = std::min<uint32_t>(layout.vocab_size, layout.draws ? 6 : 20);
    uint32_t count = uint32_t(below(most + 1));
    std::vector<uint32_t> draws(count, 1);
    if (layout.draws) {
      if (count > layout.draws) count = layout.draws, draws.resize(count);
      for (uint32_t left = layout.draws - count; count && left; --left) ++draws[below(count)];
      std::sort(draws.rbegin(), draws.rend());
    }
    const auto first = int32_t(below(layout.vocab_size));
    double left = 1;
    float last = 0;
    for (uint32_t i = 0; i < count; ++i) {
      out.ids.push_back(int32_t((first + i * 7) % layout.vocab_size));
      const double p = left * std::pow(double(below(1000) + 1) / 1001, 2);
      left -= p;
      const float logprob = layout.draws ? float(std::log(double(draws[i]) / layout.draws))
                                         : std::min(last, float(std::log(p)));
      out.logprobs.push_back(last = logprob);
    }
    out.counts.push_back(int32_t(count));
  }
  return out;
}

void mutate(std::vector<uint8_t>& bytes) {
  switch (below(6)) {
    case 0:
      bytes.resize(below(bytes.size() + 1));
      return;
    case 1:
      for (uint64_t n = below(40); n-- > 0;) bytes.push_back(uint8_t(rng()));
      return;
    case 2:  // a word of extremes
      if (bytes.size() >= 4) {
        const uint32_t words[] = {0, 1, 0x7FFFFFFF, 0xFFFFFFFF, uint32_t(bytes.size())};
        std::memcpy(bytes.data() + below(bytes.size() - 3), &words[below(5)], 4);
      }
      return;
    default:
      for (uint64_t n = 1 + below(8); n-- > 0 && !bytes.empty();)
        bytes[below(bytes.size())] = uint8_t(rng());
  }
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void check_ids(const Layout& layout, const int32_t* ids, size_t n) {
  for (size_t i = 0; i < n; ++i)
    require(ids[i] >= 0 && uint32_t(ids[i]) < layout.vocab_size, "an id out of range");
}

// model: null for `exact`.
void decode(const Layout& layout, const EntropyModel* model, const std::vector<uint8_t>& stream,
            size_t rows, size_t entries) {
  const RowBuffers found = model ? decode_compact(*model, stream, rows, entries, rows)
                                 : decode_exact(layout, stream, rows, entries);
  require(found.counts.size() == rows && found.ids.size() == entries, "rows went missing");
  check_ids(layout, found.ids.data(), entries);
}

void put_frame(std::vector<uint8_t>& file, FrameHeader header, const std::vector<uint8_t>& body) {
  header.magic = kFrameMagic;
  header.payload_bytes = uint32_t(body.size());
  header.payload_crc = crc32(body);
  std::vector<uint8_t> bytes;
  store(bytes, header);
  header.crc = crc32(Bytes(bytes).subspan(0, 44));
  std::memcpy(bytes.data() + 44, &header.crc, 4);
  file.insert(file.end(), bytes.begin(), bytes.end());
  file.insert(file.end(), body.begin(), body.end());
}

// A shard of one block, any of its parts mutated before the checksums are taken.
void read_shard(const Layout& layout, const std::vector<uint8_t>& model, const RowBuffers& rows,
                std::vector<uint8_t> stream, bool compact) {
  std::vector<uint8_t> file(kShardHeaderBytes), index, used_model = model;
  FrameHeader frame{}, model_frame{};
  model_frame.type = kModelFrame;
  frame.type = kRowsFrame;
  frame.codec = compact ? kCompact : kExact;
  frame.rows = uint32_t(rows.counts.size());
  frame.entries = uint32_t(rows.ids.size());
  frame.max_count = 20;
  frame.model_offset = kShardHeaderBytes;
  const auto part = below(4);
  if (part == 0) mutate(stream);
  if (part == 1) mutate(used_model);
  if (part == 2) {
    std::vector<uint8_t> bytes;
    store(bytes, frame);
    bytes[4 + below(40)] = uint8_t(rng());
    std::memcpy(&frame, bytes.data(), sizeof(frame));
  }
  put_frame(file, model_frame, used_model);
  const uint64_t block_at = file.size();
  put_frame(file, frame, stream);
  const uint64_t total = rows.counts.size();
  for (uint64_t word : {uint64_t(0), total / 2, total, uint64_t(0), block_at}) store(index, word);
  if (part == 3) {
    const uint64_t words[] = {0, 1, ~uint64_t(0), uint64_t(1) << 63, file.size(), rng()};
    std::memcpy(index.data() + 8 * below(5), &words[below(6)], 8);
  }
  const uint64_t index_at = file.size();
  file.insert(file.end(), index.begin(), index.end());
  store(file, crc32(index));
  file.resize(file.size() + 64);
  Codecs codecs;
  codecs[kExact] = std::make_unique<ExactCodec>(layout);
  codecs[kCompact] = std::make_unique<CompactCodec>(layout);
  const Shard shard(file, {total, 2, 1, index_at, index.size(), false}, std::move(codecs));
  std::vector<int32_t> ids(total * 8), counts(total);
  std::vector<float> logprobs(total * 8), statistics(3 * total);
  float* pointers[] = {statistics.data(), statistics.data() + total, statistics.data() + 2 * total};
  shard.index().document_rows(0);
  shard.max_count(0, total);
  shard.index().check();
  shard.check_block(0);
  shard.check_frames();
  shard.read(0, total, {ids.data(), logprobs.data(), counts.data(), 8, pointers});
  for (size_t row = 0; row < total; ++row) {
    require(counts[row] >= 0 && counts[row] <= 8, "a count out of range");
    check_ids(layout, ids.data() + 8 * row, size_t(counts[row]));
  }
}

}  // namespace

int main(int, char** arguments) {
  const uint64_t inputs = std::strtoull(arguments[1], nullptr, 10);
  rng.seed(std::strtoull(arguments[2], nullptr, 10));
  uint64_t refused = 0;
  for (uint64_t input = 0; input < inputs;) {
    const uint32_t vocab_sizes[] = {1, 50, 300, 5000};
    const Layout layout{vocab_sizes[below(4)], uint32_t(below(3) ? 0 : 1 + below(60)),
                        kMinValueBits + int(below(kMaxValueBits - kMinValueBits + 1))};
    const RowBuffers rows = random_rows(layout, 1 + below(30));
    const Rows view{rows.counts, rows.ids, rows.logprobs};
    check_rows(layout, view);
    std::vector<uint64_t> id_counts(layout.vocab_size);
    for (const int32_t id : rows.ids) ++id_counts[size_t(id)];
    const std::vector<uint8_t> payload =
        EntropyModel::train(layout, id_counts, view, 1 + below(200));
    const EntropyModel model(payload, layout);
    const std::vector<uint8_t> compact = encode_compact(model, OrdinalOfId(model.order()), view);
    const std::vector<uint8_t> exact = encode_exact(view);
    decode(layout, &model, compact, rows.counts.size(), rows.ids.size());
    for (int variant = 0; variant < 200 && input < inputs; ++variant, ++input) {
      std::vector<uint8_t> bytes = variant % 8 == 0 ? exact : compact;
      size_t row_count = rows.counts.size(), entries = rows.ids.size();
      try {
        if (variant % 4 == 1) {
          std::vector<uint8_t> bad = payload;
          mutate(bad);
          const EntropyModel hostile(bad, layout);
          decode(layout, &hostile, compact, row_count, entries);
        } else if (variant % 4 == 2) {
          read_shard(layout, payload, rows, compact, true);
        } else {
          mutate(bytes);
          if (below(4) == 0) entries = below(3 * entries + 2);
          if (below(8) == 0) row_count = below(3 * row_count + 2);
          decode(layout, variant % 8 == 0 ? nullptr : &model, bytes, row_count, entries);
        }
      } catch (const Corrupt&) {
        ++refused;
      }
    }
  }
  std::printf("%llu of %llu inputs refused\n", (unsigned long long)refused,
              (unsigned long long)inputs);
  return 0;
}

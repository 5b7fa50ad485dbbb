// megatron_pd.store._logit_codec: the codec on NumPy arrays.  The GIL is released while it works.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <system_error>

#include "compact/codec.h"
#include "container/mapped_file.h"
#include "container/shard.h"
#include "exact/codec.h"

namespace py = pybind11;
using namespace logit_codec;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), size_t(array.size())};
}

Bytes bytes_of(const py::buffer_info& info) {
  return {static_cast<const uint8_t*>(info.ptr), size_t(info.size * info.itemsize)};
}

py::bytes to_python(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

template <class T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(py::ssize_t(values.size()), values.data());
}

// (counts, ids, logprobs)
py::tuple to_python(const RowBuffers& rows) {
  return py::make_tuple(array_of(rows.counts), array_of(rows.ids), array_of(rows.logprobs));
}

// The arrays of rows without padding, checked to fit together.
Rows rows_of(const Array<int32_t>& counts, const Array<int32_t>& ids,
             const Array<float>& logprobs) {
  int64_t entries = 0;
  for (const int32_t count : span_of(counts)) {
    if (count < 0) refuse<BadRows>("a row has ", count, " entries");
    entries += count;
  }
  if (entries != ids.size() || entries != logprobs.size())
    refuse<BadRows>("the counts sum to ", entries, ", and there are ", ids.size(), " ids and ",
                    logprobs.size(), " log-probabilities");
  return {span_of(counts), span_of(ids), span_of(logprobs)};
}

// Padded [n, K] arrays to flat ones, checked row by row.
py::tuple ragged(const Array<int32_t>& ids, const Array<float>& logprobs,
                 const Array<int32_t>& counts, uint32_t vocab_size, uint32_t draws) {
  if (ids.ndim() != 2 || logprobs.ndim() != 2 || counts.ndim() != 1 ||
      ids.shape(0) != logprobs.shape(0) || ids.shape(1) != logprobs.shape(1) ||
      ids.shape(0) != counts.shape(0))
    refuse<BadRows>("ids, logprobs and counts must be [n, K], [n, K] and [n]");
  const auto width = ids.shape(1);
  py::ssize_t entries = 0;
  for (const int32_t count : span_of(counts)) {
    if (count < 0 || count > width || count > int32_t(kMaxEntriesOfARow))
      refuse<BadRows>("a row has ", count, " entries, in arrays of ", width, " columns; a row has ",
                      kMaxEntriesOfARow, " at most");
    entries += count;
  }
  Array<int32_t> flat_ids(entries);
  Array<float> flat_logprobs(entries);
  int32_t* id = flat_ids.mutable_data();
  float* logprob = flat_logprobs.mutable_data();
  const Rows rows{span_of(counts), span_of(flat_ids), span_of(flat_logprobs)};
  {
    const py::gil_scoped_release release;
    for (size_t row = 0; row < rows.counts.size(); ++row) {
      const auto count = rows.counts[row];
      id = std::copy_n(ids.data() + py::ssize_t(row) * width, count, id);
      logprob = std::copy_n(logprobs.data() + py::ssize_t(row) * width, count, logprob);
    }
    check_rows({vocab_size, draws, kMinValueBits}, rows);
  }
  return py::make_tuple(flat_ids, flat_logprobs);
}

Layout checked_layout(uint32_t vocab_size, uint32_t draws, int value_bits) {
  if (value_bits < kMinValueBits || value_bits > kMaxValueBits)
    refuse("value_bits is ", value_bits, ", not in [", kMinValueBits, ", ", kMaxValueBits, "]");
  if (vocab_size == 0 || vocab_size > (1u << kMaxVocabSizeLog2))
    refuse("the vocabulary has ", vocab_size, " ids, not 1 to ", 1u << kMaxVocabSizeLog2);
  if (draws > kMaxEntriesOfARow)
    refuse("rows have ", draws, " draws, not at most ", kMaxEntriesOfARow);
  return {vocab_size, draws, value_bits};
}

// Codec `compact` with one entropy model.
class CompactCoder {
 public:
  CompactCoder(const py::buffer& payload, uint32_t vocab_size, uint32_t draws, int value_bits)
      : model_(bytes_of(payload.request()), checked_layout(vocab_size, draws, value_bits)),
        ordinal_of_id_(model_.order()) {}

  py::bytes encode(const Array<int32_t>& counts, const Array<int32_t>& ids,
                   const Array<float>& logprobs) const {
    const Rows rows = rows_of(counts, ids, logprobs);
    std::vector<uint8_t> out;
    {
      const py::gil_scoped_release release;
      check_rows(model_.layout(), rows);
      out = encode_compact(model_, ordinal_of_id_, rows);
    }
    return to_python(out);
  }

  py::tuple decode(const py::buffer& stream, uint32_t rows, uint32_t entries) const {
    return to_python(decode_compact(model_, bytes_of(stream.request()), rows, entries, rows));
  }

  py::bytes slice(const py::buffer& stream, uint32_t rows, uint32_t entries, uint32_t first,
                  uint32_t stop) const {
    if (first > stop || stop > rows)
      refuse<std::out_of_range>("rows ", first, " to ", stop, " of a block of ", rows);
    const std::vector<uint8_t> part =
        slice_compact(model_, bytes_of(stream.request()), rows, entries, first, stop - first);
    return to_python(part);
  }

 private:
  EntropyModel model_;
  OrdinalOfId ordinal_of_id_;
};

// A codec in Python: `decoder_of(offset, model)` makes what decodes the blocks with one model,
// `decode(offset, stream, rows, entries)` -> (counts, ids, logprobs); `offset` is the block's, for
// errors.  Slower than C++, as the interpreter's lock is taken for every block.
class PythonCodec final : public Codec {
 public:
  PythonCodec(const Layout& layout, size_t statistic_bytes, py::function decoder_of)
      : layout_(layout), statistic_bytes_(statistic_bytes), decoder_of_(std::move(decoder_of)) {}

  size_t statistic_bytes() const override { return statistic_bytes_; }

  RowBuffers decode(const Frames& frames, const Block& block, size_t) const override {
    const py::gil_scoped_acquire acquire;
    const FrameHeader& header = block.header;
    const py::tuple found =
        decoder(frames, block)(block.offset, to_python(block.stream), header.rows, header.entries);
    const auto counts = found[0].cast<Array<int32_t>>();
    const auto ids = found[1].cast<Array<int32_t>>();
    const auto logprobs = found[2].cast<Array<float>>();
    try {
      if (counts.size() != header.rows || ids.size() != header.entries)
        refuse("its codec gives ", counts.size(), " rows of ", ids.size(),
               " entries in all, its header says ", header.rows, " and ", header.entries);
      check_rows(layout_, rows_of(counts, ids, logprobs));
    } catch (const BadRows& error) {
      refuse("its codec gives rows that no store holds: ", error.what());
    }
    const auto copy = [](const auto& array) {
      return std::vector(array.data(), array.data() + array.size());
    };
    return {copy(counts), copy(ids), copy(logprobs)};
  }

 private:
  // The lock is held.
  py::object decoder(const Frames& frames, const Block& block) const {
    const uint64_t at = block.header.model_offset;
    if (const auto known = decoders_.find(at); known != decoders_.end()) return known->second;
    py::object model = py::none();
    if (at != 0) model = to_python(frames.model(block.header));
    py::object made = decoder_of_(block.offset, model);
    decoders_[at] = made;
    return made;
  }

  Layout layout_;
  size_t statistic_bytes_;
  py::function decoder_of_;
  mutable std::map<uint64_t, py::object> decoders_;  // by the model's offset
};

// others: number -> (bytes of a statistic's value, decoder_of) of the codecs that are in Python.
Codecs codecs_of(const Layout& layout, const py::dict& others) {
  Codecs codecs;
  codecs[kExact] = std::make_unique<ExactCodec>(layout);
  codecs[kCompact] = std::make_unique<CompactCodec>(layout);
  for (const auto& [number, codec] : others) {
    const auto [statistic_bytes, decoder_of] = codec.cast<std::pair<size_t, py::function>>();
    codecs[number.cast<uint8_t>()] =
        std::make_unique<PythonCodec>(layout, statistic_bytes, decoder_of);
  }
  return codecs;
}

// A shard and its mapping.
class MappedShard {
 public:
  MappedShard(const std::string& path, uint64_t rows, uint64_t documents, uint64_t blocks,
              uint64_t index_offset, uint64_t index_bytes, bool bound, uint32_t vocab_size,
              uint32_t draws, int value_bits, const py::dict& codecs)
      : file_(path),
        shard_(file_.bytes(), {rows, documents, blocks, index_offset, index_bytes, bound},
               codecs_of(checked_layout(vocab_size, draws, value_bits), codecs)) {}

  // What `work` finds in the shard.  Where the file could not be read, whatever was found, and be
  // it an error, counts for nothing.
  template <class Work>
  auto look(Work&& work) const -> std::invoke_result_t<Work, const Shard&> {
    MappedFile::guard();
    try {
      if constexpr (std::is_void_v<std::invoke_result_t<Work, const Shard&>>) {
        work(shard_);
        check_readable();
      } else {
        auto found = work(shard_);
        check_readable();
        return found;
      }
    } catch (...) {
      check_readable();
      throw;
    }
  }

  void read(uint64_t begin, uint64_t end, Array<int32_t>& ids, Array<float>& logprobs,
            Array<int32_t>& counts, uint64_t first, py::object statistics) const {
    if (ids.ndim() != 2 || logprobs.ndim() != 2 || counts.ndim() != 1 ||
        ids.shape(0) != counts.shape(0) || logprobs.shape(0) != counts.shape(0) ||
        ids.shape(1) != logprobs.shape(1) || begin > end ||
        first + (end - begin) > uint64_t(counts.shape(0)))
      throw py::value_error("the output arrays must be [rows, K], [rows, K] and [rows]");
    Output out{ids.mutable_data(), logprobs.mutable_data(), counts.mutable_data(),
               uint32_t(ids.shape(1))};
    out.ids += first * out.width;
    out.logprobs += first * out.width;
    out.counts += first;
    float* pointers[kStatistics];
    if (!statistics.is_none()) {
      auto array = statistics.cast<Array<float>>();
      if (array.ndim() != 2 || array.shape(0) != kStatistics ||
          uint64_t(array.shape(1)) != end - begin)
        throw py::value_error("the output of statistics must be [3, rows]");
      for (int c = 0; c < kStatistics; ++c) pointers[c] = array.mutable_data(c);
      out.statistics = pointers;
    }
    const py::gil_scoped_release release;
    look([&](const Shard& shard) { shard.read(begin, end, out); });
  }

  Array<uint64_t> starts() const {
    return look([](const Shard& shard) {
      const Index& index = shard.index();
      const uint64_t words = index.geometry().documents + 1;
      Array<uint64_t> out{py::ssize_t(words)};
      uint64_t* start = out.mutable_data();
      for (uint64_t i = 0; i < words; ++i) start[i] = i ? index.document_rows(i - 1).second : 0;
      return out;
    });
  }

  // First row of every block.
  Array<uint64_t> block_rows() const {
    return look([](const Shard& shard) {
      Array<uint64_t> out{py::ssize_t(shard.index().geometry().blocks)};
      uint64_t* row = out.mutable_data();
      for (py::ssize_t i = 0; i < out.size(); ++i) row[i] = shard.index().block(uint64_t(i)).first;
      return out;
    });
  }

  // Of the documents [first, stop).
  Array<uint64_t> digests(uint64_t first, uint64_t stop) const {
    if (first > stop) throw py::value_error("the documents end before they begin");
    return look([&](const Shard& shard) {
      Array<uint64_t> out{py::ssize_t(stop - first)};
      uint64_t* digest = out.mutable_data();
      for (uint64_t i = first; i < stop; ++i) *digest++ = shard.index().digest(i);
      return out;
    });
  }

 private:
  void check_readable() const {
    if (file_.is_lost())
      refuse(
          "it was cut short, or its disk failed, since it was opened: bytes that it had can't "
          "be read");
  }

  MappedFile file_;
  Shard shard_;
};

}  // namespace

PYBIND11_MODULE(_logit_codec, module) {
  static py::exception<Corrupt> corrupt(module, "CorruptError", PyExc_ValueError);
  static py::exception<BadRows> bad_rows(module, "BadRowsError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Corrupt& what) {
      py::set_error(corrupt, what.what());
    } catch (const BadRows& what) {
      py::set_error(bad_rows, what.what());
    } catch (const std::system_error& what) {
      errno = what.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });
  module.attr("MIN_VALUE_BITS") = kMinValueBits;
  module.attr("MAX_VALUE_BITS") = kMaxValueBits;
  module.attr("NATIVE_CODECS") = py::make_tuple(kExact, kCompact);
  module.def("ragged", &ragged);
  module.def("encode_exact", [](const Array<int32_t>& counts, const Array<int32_t>& ids,
                                const Array<float>& logprobs) {
    return to_python(encode_exact(rows_of(counts, ids, logprobs)));
  });
  module.def("decode_exact",
             [](const py::buffer& stream, uint32_t rows, uint32_t entries, uint32_t vocab_size) {
               return to_python(decode_exact(checked_layout(vocab_size, 0, kMinValueBits),
                                             bytes_of(stream.request()), rows, entries));
             });
  module.def("train", [](uint32_t vocab_size, uint32_t draws, int value_bits,
                         const Array<uint64_t>& id_counts, const Array<int32_t>& counts,
                         const Array<int32_t>& ids, const Array<float>& logprobs) {
    const Layout layout = checked_layout(vocab_size, draws, value_bits);
    const Rows rows = rows_of(counts, ids, logprobs);
    if (id_counts.size() != vocab_size)
      refuse<BadRows>("id_counts has ", id_counts.size(), " counts, for a vocabulary of ",
                      vocab_size);
    std::vector<uint8_t> out;
    {
      const py::gil_scoped_release release;
      check_rows(layout, rows);
      out = EntropyModel::train(layout, span_of(id_counts), rows);
    }
    return to_python(out);
  });
  py::class_<CompactCoder>(module, "CompactCoder")
      .def(py::init<const py::buffer&, uint32_t, uint32_t, int>())
      .def("encode", &CompactCoder::encode)
      .def("decode", &CompactCoder::decode)
      .def("slice", &CompactCoder::slice);
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<MappedShard>(module, "Shard")
      .def(py::init<const std::string&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, bool,
                    uint32_t, uint32_t, int, const py::dict&>(),
           py::arg("path"), py::kw_only(), py::arg("rows"), py::arg("documents"), py::arg("blocks"),
           py::arg("index_offset"), py::arg("index_bytes"), py::arg("bound"), py::arg("vocab_size"),
           py::arg("draws"), py::arg("value_bits"), py::arg("codecs"))
      .def("document_rows",
           [](const MappedShard& mapped, uint64_t i) {
             return mapped.look([&](const Shard& shard) { return shard.index().document_rows(i); });
           })
      .def("starts", &MappedShard::starts)
      .def("digests", &MappedShard::digests)
      .def("block_rows", &MappedShard::block_rows)
      .def("block_header",
           [](const MappedShard& mapped, uint64_t i) {
             const auto header =
                 mapped.look([&](const Shard& shard) { return shard.block(i).header; });
             return to_python({reinterpret_cast<const uint8_t*>(&header), sizeof(header)});
           })
      .def("block_payload",
           [](const MappedShard& mapped, uint64_t i) {
             return mapped.look(
                 [&](const Shard& shard) { return to_python(shard.block(i).payload); });
           })
      .def("block_model",
           [](const MappedShard& mapped, uint64_t i) {
             return mapped.look([&](const Shard& shard) {
               return to_python(shard.frames().model(shard.block(i).header));
             });
           })
      .def("max_count",
           [](const MappedShard& mapped, uint64_t begin, uint64_t end) {
             return mapped.look([&](const Shard& shard) { return shard.max_count(begin, end); });
           })
      .def(
          "check_block",
          [](const MappedShard& mapped, uint64_t i) {
            mapped.look([&](const Shard& shard) { shard.check_block(i); });
          },
          unlocked)
      .def(
          "check_index",
          [](const MappedShard& mapped) {
            mapped.look([](const Shard& shard) { shard.index().check(); });
          },
          unlocked)
      .def(
          "check_frames",
          [](const MappedShard& mapped) {
            mapped.look([](const Shard& shard) { shard.check_frames(); });
          },
          unlocked)
      .def("read", &MappedShard::read, py::arg("begin"), py::arg("end"), py::arg("ids").noconvert(),
           py::arg("logprobs").noconvert(), py::arg("counts").noconvert(), py::arg("first"),
           py::arg("statistics") = py::none());
}

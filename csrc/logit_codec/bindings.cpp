// megatron_pd.store._logit_codec: the codec on NumPy arrays.  The GIL is released while it works.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "compact/codec.h"
#include "container/shard.h"
#include "exact/codec.h"

namespace py = pybind11;
using namespace logit_codec;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Span<const T> span_of(const Array<T>& array) {
    return {array.data(), size_t(array.size())};
}

Bytes bytes_of(const py::buffer_info& info) {
    return {static_cast<const uint8_t*>(info.ptr), size_t(info.size * info.itemsize)};
}

py::bytes to_python(const std::vector<uint8_t>& bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
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

    py::bytes slice(const py::buffer& stream, uint32_t rows, uint32_t entries, uint32_t first,
                    uint32_t count) const {
        if (first > rows || count > rows - first)
            refuse<std::out_of_range>("rows ", first, " to ", uint64_t(first) + count,
                                      " of a block of ", rows);
        return to_python(slice_compact(model_, bytes_of(stream.request()), rows, entries, first,
                                       count));
    }

   private:
    EntropyModel model_;
    OrdinalOfId ordinal_of_id_;
};

Codecs codecs_of(const Layout& layout) {
    Codecs codecs;
    codecs[kExact] = std::make_unique<ExactCodec>(layout);
    codecs[kCompact] = std::make_unique<CompactCodec>(layout);
    return codecs;
}

// Keeps the mapping alive as long as the shard.
class MappedShard {
   public:
    MappedShard(const py::buffer& file, uint64_t rows, uint64_t documents, uint64_t blocks,
                uint64_t index_offset, uint64_t index_bytes, bool bound, uint32_t vocab_size,
                uint32_t draws, int value_bits)
        : file_(file.request()),
          shard_(bytes_of(file_), {rows, documents, blocks, index_offset, index_bytes, bound},
                 codecs_of(checked_layout(vocab_size, draws, value_bits))) {}

    const Shard& get() const { return shard_; }

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
        shard_.read(begin, end, out);
    }

    py::array_t<uint64_t> starts() const {
        const Index& index = shard_.index();
        const uint64_t words = index.geometry().documents + 1;
        py::array_t<uint64_t> out{py::ssize_t(words)};
        uint64_t* start = out.mutable_data();
        for (uint64_t i = 0; i < words; ++i)
            start[i] = i ? index.document_rows(i - 1).second : 0;
        return out;
    }

   private:
    py::buffer_info file_;
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
        }
    });
    module.attr("MIN_VALUE_BITS") = kMinValueBits;
    module.attr("MAX_VALUE_BITS") = kMaxValueBits;
    module.def("ragged", &ragged);
    module.def("encode_exact", [](const Array<int32_t>& counts, const Array<int32_t>& ids,
                                  const Array<float>& logprobs) {
        return to_python(encode_exact(rows_of(counts, ids, logprobs)));
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
        .def("slice", &CompactCoder::slice);
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<MappedShard>(module, "Shard")
        .def(py::init<const py::buffer&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, bool,
                      uint32_t, uint32_t, int>(),
             py::arg("file"), py::kw_only(), py::arg("rows"), py::arg("documents"),
             py::arg("blocks"), py::arg("index_offset"), py::arg("index_bytes"), py::arg("bound"),
             py::arg("vocab_size"), py::arg("draws"), py::arg("value_bits"))
        .def("document_rows",
             [](const MappedShard& shard, uint64_t i) { return shard.get().index().document_rows(i); })
        .def("starts", &MappedShard::starts)
        .def("digest", [](const MappedShard& shard, uint64_t i) { return shard.get().index().digest(i); })
        .def("block", [](const MappedShard& shard, uint64_t i) { return shard.get().index().block(i); })
        .def("max_count", [](const MappedShard& shard, uint64_t begin,
                             uint64_t end) { return shard.get().max_count(begin, end); })
        .def("check_block",
             [](const MappedShard& shard, uint64_t i) { shard.get().check_block(i); }, unlocked)
        .def("check_index", [](const MappedShard& shard) { shard.get().index().check(); }, unlocked)
        .def("check_frames", [](const MappedShard& shard) { shard.get().check_frames(); }, unlocked)
        .def("read", &MappedShard::read, py::arg("begin"), py::arg("end"),
             py::arg("ids").noconvert(), py::arg("logprobs").noconvert(),
             py::arg("counts").noconvert(), py::arg("first"), py::arg("statistics") = py::none());
}

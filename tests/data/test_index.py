"""A corpus read without Megatron is what Megatron reads."""

import subprocess
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.index import HEADER
from megatron_pd.errors import UserError

INTEGERS = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]


def build(prefix, dtype, *, multimodal=False):
    """Random documents of one or several sequences, some of them empty."""
    rng = np.random.default_rng()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal)
    for _ in range(int(rng.integers(1, 60))):
        lengths = rng.integers(0, 30, rng.integers(1, 4)).tolist()
        tokens = rng.integers(0, np.iinfo(dtype).max, sum(lengths)).astype(dtype)
        builder.add_document(tokens, lengths, [0] * len(lengths) if multimodal else None)
    builder.finalize(f"{prefix}.idx")
    return IndexedDataset(str(prefix))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("multimodal", [False, True])
def test_documents_are_those_that_megatron_reads(tmp_path, dtype, multimodal):
    expected = build(tmp_path / "corpus", dtype, multimodal=multimodal)
    found = MegatronCorpus(str(tmp_path / "corpus"))
    assert len(found) == len(expected)
    assert found.document_lengths.dtype == np.int64
    np.testing.assert_array_equal(found.document_lengths, expected.sequence_lengths)
    for document, length in enumerate(found.document_lengths.tolist()):
        tokens = expected.get(document)
        assert found.tokens(document).dtype == dtype
        np.testing.assert_array_equal(found.tokens(document), tokens)
        offset = np.random.randint(length + 1)
        part = np.random.randint(length - offset + 1)
        np.testing.assert_array_equal(
            found.tokens(document, offset, part), tokens[offset : offset + part]
        )
        np.testing.assert_array_equal(found.tokens(document, offset), tokens[offset:])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_many_spans_are_gathered_at_once(tmp_path, dtype):
    build(tmp_path / "corpus", dtype)
    corpus = MegatronCorpus(str(tmp_path / "corpus"))
    rng = np.random.default_rng()
    documents = rng.integers(0, len(corpus), 50)
    offsets = rng.integers(0, corpus.document_lengths[documents] + 1)
    lengths = rng.integers(0, corpus.document_lengths[documents] - offsets + 1)
    spans = (documents, offsets, lengths)
    found = corpus.gather(*spans)
    assert found.dtype == dtype
    expected = [corpus.tokens(*span) for span in zip(*spans, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    assert len(corpus.gather(*(values[:0] for values in spans))) == 0


def test_tokens_may_lie_at_any_byte(tmp_path):
    """As an index allows."""
    built = build(tmp_path / "corpus", np.int32)
    expected = np.concatenate([built.get(document) for document in range(len(built))])
    tokens, index = (tmp_path / f"corpus.{suffix}" for suffix in ("bin", "idx"))
    tokens.write_bytes(b"\0" + tokens.read_bytes())
    changed = bytearray(index.read_bytes())
    positions = np.frombuffer(changed, "<i8", len(built), HEADER.size + 4 * len(built))
    positions += 1
    index.write_bytes(changed)
    corpus = MegatronCorpus(str(tmp_path / "corpus"))
    whole = (np.arange(len(corpus)), np.zeros(len(corpus), np.int64), corpus.document_lengths)
    np.testing.assert_array_equal(corpus.gather(*whole), expected)


def test_every_type_of_tokens_is_known_or_refused(tmp_path):
    for dtype in DType:
        builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), getattr(np, dtype.name))
        builder.finalize(str(tmp_path / "a.idx"))
        if dtype in (DType.float32, DType.float64):
            with pytest.raises(UserError, match=f"tokens of type {dtype.value}"):
                MegatronCorpus(str(tmp_path / "a"))
        else:
            assert len(MegatronCorpus(str(tmp_path / "a"))) == 0


def test_what_is_no_corpus_is_a_sentence(tmp_path):
    prefix = str(tmp_path / "corpus")
    build(prefix, np.uint16)
    index, tokens = ((tmp_path / f"corpus.{suffix}").read_bytes() for suffix in ("idx", "bin"))
    for name, content, message in (
        ("idx", b"", "no index of a Megatron corpus"),
        ("idx", b"MMIDXXX" + index[7:], "no index of a Megatron corpus"),
        ("idx", index[:9] + b"\2" + index[10:], "version 2"),
        ("idx", index[:5], "cut short"),
        ("idx", index[:33], "cut short"),
        ("idx", index[: len(index) // 2], "cut short"),
        ("bin", tokens[:-1], "cut short, or belongs to another index"),
    ):
        (tmp_path / f"corpus.{name}").write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            MegatronCorpus(prefix)
        assert str(tmp_path / f"corpus.{name}") in str(error.value)
        (tmp_path / "corpus.idx").write_bytes(index)
        (tmp_path / "corpus.bin").write_bytes(tokens)
    (tmp_path / "corpus.idx").unlink()
    with pytest.raises(UserError, match=r"corpus\.bin has no .*corpus\.idx: .*was killed"):
        MegatronCorpus(prefix)
    (tmp_path / "corpus.idx").mkdir()
    with pytest.raises(UserError, match=r"corpus\.idx is a folder"):
        MegatronCorpus(prefix)


def test_it_needs_neither_torch_nor_megatron():
    program = (
        "import sys, megatron_pd.data.corpus, megatron_pd.data.corpus_writer\n"
        "print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr

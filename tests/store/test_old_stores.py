"""Stores of release 0.1.0, whose manifests name no codecs, are read, copied and gone on with.

tests/assets/stores/without_codecs was written by that release: the rows `given_*` of rows.npz, in
both codecs and two shards, what it read back (`exact_*`, `compact_*`), and a dump that was stopped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.verify import verify_store

ASSETS = Path(__file__).parents[1] / "assets" / "stores" / "without_codecs"
VOCAB = 50


class Corpus:
    def __init__(self) -> None:
        self.arrays = np.load(ASSETS / "rows.npz")
        self.document_lengths = self.arrays["lengths"]
        self.starts = np.concatenate([[0], np.cumsum(self.document_lengths)])

    def part(self, name: str, document: int) -> np.ndarray:
        return self.arrays[name][self.starts[document] : self.starts[document + 1]]

    def tokens(self, document: int) -> np.ndarray:
        return self.part("tokens", document)

    def rows(self, kind: str, document: int) -> TeacherRows:
        names = ("ids", "logprobs", "counts")
        statistics = {
            name: self.part(f"{kind}_{name}", document) for name in ("label_logprob", "std")
        }
        return TeacherRows(*(self.part(f"{kind}_{name}", document) for name in names), statistics)


@pytest.fixture
def corpus() -> Corpus:
    return Corpus()


def assert_bit_identical(store: LogitStore, corpus: Corpus, kind: str) -> None:
    for document in range(store.num_documents):
        found, expected = store.read(document), corpus.rows(kind, document)
        width = found.ids.shape[1]
        np.testing.assert_array_equal(found.counts, expected.counts)
        np.testing.assert_array_equal(found.ids, expected.ids[:, :width])
        for a, b in [
            (found.logprobs, expected.logprobs[:, :width]),
            *((found.statistics[name], expected.statistics[name]) for name in expected.statistics),
        ]:
            assert a.tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_rows_are_bit_identical(tmp_path, monkeypatch, corpus, codec):
    path = ASSETS / f"{codec}.pd"
    store = LogitStore(path)
    assert store.manifest.codecs is None and store.codecs == {codec}
    assert_bit_identical(store, corpus, codec)
    store.check_corpus(corpus, full=True)
    assert verify_store(path) == []
    words = ["merge", str(path), "--output", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", ["megatron-pd", *words])
    assert main() == 0
    merged = LogitStore(tmp_path / "m")
    assert [entry["name"] for entry in merged.manifest.codecs] == [codec]
    assert_bit_identical(merged, corpus, codec)


def test_a_stopped_dump_goes_on(tmp_path, corpus):
    path = tmp_path / "unfinished.pd"
    shutil.copytree(ASSETS / "unfinished.pd", path)
    settings = {
        "vocab_size": VOCAB,
        "document_lengths": corpus.document_lengths,
        "metadata": {"teacher": "random"},
        "corpus": corpus,
        "statistics": ["label_logprob", "std"],
    }
    with pytest.raises(StoreError, match="the store was begun with codecs=None, now codecs="):
        LogitStoreWriter(path, codec="test_own_codec:ZlibCodec", **settings)
    with LogitStoreWriter(path, **settings) as writer:
        assert [writer.written(document) for document in range(5)] == [4, 0, 0, 14, 0]
        for document in range(5):
            done = writer.written(document)
            if done < corpus.document_lengths[document]:
                writer.append(document, done, corpus.rows("given", document)[done:])
    assert verify_store(path) == []
    assert_same_ids(LogitStore(path), corpus)


def assert_same_ids(store: LogitStore, corpus: Corpus) -> None:
    for document in range(store.num_documents):
        found, expected = store.read(document), corpus.rows("given", document)
        np.testing.assert_array_equal(found.counts, expected.counts)
        for row, count in enumerate(found.counts.tolist()):
            assert set(found.ids[row, :count]) == set(expected.ids[row, :count])

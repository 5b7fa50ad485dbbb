"""The statistics of a store's rows are declared, whatever its documents are like."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.verify import verify_store

VOCAB = 61
DECLARED = ("label_logprob", "entropy")


def corpus_of(rng, lengths: list[int]) -> RandomCorpus:
    corpus = RandomCorpus(rng, len(lengths), VOCAB)
    corpus.document_lengths = np.array(lengths, np.int64)
    corpus._tokens = [rng.integers(0, VOCAB, n) for n in lengths]
    return corpus


def write(path: Path, rng, corpus, statistics=DECLARED, documents=None) -> None:
    """A document of one token comes as a row without anything, as do all last rows."""
    with LogitStoreWriter(
        path,
        vocab_size=VOCAB,
        document_lengths=corpus.document_lengths,
        metadata={},
        codec="exact",
        corpus=corpus,
        statistics=statistics,
        documents=documents,
    ) as writer:
        for document in writer.documents:
            length = int(corpus.document_lengths[document])
            if length > 1:
                rows = random_rows(rng, length, VOCAB, 5, statistics=bool(statistics))
                writer.append(document, 0, rows[: length - 1])
            if length:
                writer.append(document, length - 1, TeacherRows.empty(1))


def copies(monkeypatch, path: Path) -> list[LogitStore]:
    """The store by way of every command."""
    out = path.with_name(path.name + "-copies")
    for words in (
        ("recode", path, "--codec", "exact", "--output", out / "recoded"),
        ("recode", path, "--codec", "exact", "--shard-tokens", "9999", "--output", out / "one"),
        ("merge", path, "--output", out / "merged"),
        ("convert", "to-parquet", path, "--output", out / "parquet"),
        ("convert", "from-parquet", out / "parquet", "--codec", "exact", "--output", out / "back"),
    ):
        out.mkdir(exist_ok=True)
        monkeypatch.setattr(sys, "argv", ["megatron-pd", *map(str, words)])
        assert main() == 0
    return [LogitStore(out / name) for name in ("recoded", "one", "merged", "back")]


@pytest.mark.parametrize(
    "lengths",
    [[0, 0, 1, 7, 0, 1, 30, 1], [1, 9], [0, 12, 0], [1, 1], [0, 0, 0], []],
    ids=str,
)
def test_they_are_kept_through_every_command(tmp_path, rng, monkeypatch, lengths) -> None:
    write(tmp_path / "s", rng, corpus_of(rng, lengths))
    store = LogitStore(tmp_path / "s")
    for copy in [store, *copies(monkeypatch, tmp_path / "s")]:
        assert verify_store(copy.path) == []
        assert copy.statistics == DECLARED
        assert copy.documents_without("entropy") == []
        for document, length in enumerate(lengths):
            found, expected = copy.read(document), store.read(document)
            assert tuple(found.statistics) == DECLARED
            for name in DECLARED:
                assert len(found.statistics[name]) == length
                np.testing.assert_array_equal(found.statistics[name], expected.statistics[name])


def test_documents_without_are_told_in_every_copy(tmp_path, rng, monkeypatch) -> None:
    corpus = corpus_of(rng, [5, 0, 3, 8, 1, 40, 6])
    write(tmp_path / "s", rng, corpus, documents=range(0, 3))
    write(tmp_path / "s", rng, corpus, (), documents=range(3, 6))
    write(tmp_path / "s", rng, corpus, documents=range(6, 7))
    for store in [LogitStore(tmp_path / "s"), *copies(monkeypatch, tmp_path / "s")]:
        assert store.statistics == DECLARED
        assert store.documents_without("entropy") == [range(3, 6)]
        assert store.statistics_of(range(3, 6)) == ()
        store.check_corpus(corpus, full=True)


@pytest.mark.parametrize("finished", [False, True])
def test_others_than_it_was_begun_with_are_refused(tmp_path, rng, finished) -> None:
    corpus = corpus_of(rng, [5, 4])
    settings = {
        "vocab_size": VOCAB,
        "document_lengths": corpus.document_lengths,
        "metadata": {},
        "codec": "exact",
    }
    writer = LogitStoreWriter(tmp_path, **settings, statistics=["entropy"])
    for document, length in enumerate([5, 4] if finished else [5]):
        rows = random_rows(rng, length, VOCAB, 5, statistics=True)
        entropy = {"entropy": rows.statistics["entropy"]}
        writer.append(document, 0, TeacherRows(rows.ids, rows.logprobs, rows.counts, entropy))
    writer.flush()
    if finished:
        writer.close()
    writer.abandon()
    for other in ((), ("entropy", "std")):
        with pytest.raises(StoreError, match=r"begun with statistics=\('entropy',\), now statis"):
            LogitStoreWriter(tmp_path, **settings, statistics=other)
    LogitStoreWriter(tmp_path, **settings, statistics=["entropy"]).abandon()

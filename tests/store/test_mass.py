"""A row whose entries have more than the whole mass is refused, whichever way it comes in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_rows import RandomCorpus, random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows, ragged
from megatron_pd.store.admin.parquet import from_parquet

VOCAB = 97


def writer(path: Path, corpus: RandomCorpus) -> LogitStoreWriter:
    return LogitStoreWriter(
        path,
        vocab_size=VOCAB,
        document_lengths=corpus.document_lengths,
        metadata={},
        codec="exact",
        corpus=corpus,
    )


def with_mass(rows: TeacherRows, row: int, mass: float) -> TeacherRows:
    """The rows, of which one is 8 equal entries of this mass."""
    count = 8
    rows.counts[row] = count
    rows.ids[row, :count] = np.arange(count)
    rows.logprobs[row, :count] = np.log(mass / count)
    return rows


@pytest.fixture
def corpus(rng) -> RandomCorpus:
    corpus = RandomCorpus(rng, 12, VOCAB)
    corpus.document_lengths[7] = 30
    corpus._tokens[7] = rng.integers(0, VOCAB, 30)
    return corpus


def test_an_append_names_the_row(tmp_path: Path, rng, corpus) -> None:
    rows = random_rows(rng, 30, VOCAB, 9)
    row = int(rng.integers(10, 29))
    sound = with_mass(random_rows(rng, 30, VOCAB, 9), row, 1.0009)
    heavy = with_mass(rows, row, 1.0012)
    with pytest.raises(StoreError, match="not complete"), writer(tmp_path, corpus) as store:
        store.append(7, 0, sound[:5])
        with pytest.raises(
            StoreError, match=rf"document 7, offset {row}: its 8 .* mass of 1\.0012"
        ):
            store.append(7, 5, heavy[5:])
        store.append(7, 5, sound[5:])  # nothing of what was refused was taken


def test_masses_are_those_of_the_rows(rng) -> None:
    rows = random_rows(rng, 300, VOCAB, 20)
    found = ragged.RaggedRows.of(rows, VOCAB, 0, str).masses()
    expected = [
        sum(np.exp(float(x)) for x in row[:count])
        for row, count in zip(rows.logprobs, rows.counts, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_parquet_in_another_logarithm(tmp_path: Path, rng, corpus) -> None:
    probs = rng.dirichlet(np.ones(6), 4)
    columns = {
        "document": np.full(4, 7),
        "offset": np.arange(3, 7),
        "ids": pa.array([list(range(6))] * 4, pa.list_(pa.int32())),
        "logprobs": pa.array(np.log10(probs).tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=r"document 7, offset 3: .* natural logarithms"):
        from_parquet([tmp_path], tmp_path / "s", vocab_size=VOCAB, corpus=corpus)


@pytest.mark.parametrize("command", ["merge", "split", "recode", "verify"])
def test_a_store_from_before_there_was_the_check(
    tmp_path: Path, rng, corpus, monkeypatch, capsys, command
) -> None:
    row = int(rng.integers(0, 29))
    with monkeypatch.context() as patch, writer(tmp_path / "old", corpus) as store:
        patch.setattr(ragged, "MAX_MASS", np.inf)
        for document, length in enumerate(corpus.document_lengths.tolist()):
            rows = random_rows(rng, length, VOCAB, 9)
            store.append(document, 0, with_mass(rows, row, 1.7) if document == 7 else rows)
    assert LogitStore(tmp_path / "old").num_rows
    words = ["megatron-pd", command, str(tmp_path / "old")]
    words += ["--output", str(tmp_path / "new")] if command != "verify" else []
    words += ["--shard-tokens", "100"] if command == "split" else []
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        sys.exit(main())
    said = "".join(capsys.readouterr())
    assert left.value.code == 1
    assert re.search(rf"document 7, offset {row}: .* mass of", said), said

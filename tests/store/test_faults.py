"""Nothing acknowledged is lost, and no damaged byte is read as if it were sound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError
from megatron_pd.store.verify import verify_store

VOCAB = 101


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy)  # type: ignore[arg-type]
    print("seed", seed)
    return np.random.default_rng(seed)


def open_writer(path: Path, corpus: RandomCorpus, **options) -> LogitStoreWriter:
    settings = {
        "vocab_size": VOCAB,
        "document_lengths": corpus.document_lengths,
        "metadata": {"teacher": "random"},
        "corpus": corpus,
        **options,
    }
    return LogitStoreWriter(path, **settings)


def small_store(path: Path, rng: np.random.Generator) -> tuple[RandomCorpus, list, Path]:
    """A finished one-shard store of a few documents: its corpus, rows and shard."""
    corpus = RandomCorpus(rng, 6, VOCAB, mean=8)
    rows = [random_rows(rng, int(n), VOCAB, 4) for n in corpus.document_lengths]
    with open_writer(path, corpus) as writer:
        for document in range(6):
            writer.append(document, 0, rows[document])
            writer.flush()
    return corpus, rows, next(path.glob("*.shard"))


def read_all(path: Path, corpus: RandomCorpus) -> None:
    store = LogitStore(path)
    store.check_corpus(corpus, full=True)
    for document in range(store.num_documents):
        store.read(document)


def test_every_flipped_bit_is_reported(tmp_path, rng):
    corpus, _, shard = small_store(tmp_path / "s", rng)
    sound = shard.read_bytes()
    assert verify_store(tmp_path / "s") == []
    for position in rng.permutation(8 * len(sound))[:400].tolist():
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << position % 8
        shard.write_bytes(damaged)
        with pytest.raises(StoreError):
            read_all(tmp_path / "s", corpus)
    assert verify_store(tmp_path / "s") != []


def test_every_truncation_is_reported(tmp_path, rng):
    corpus, _, shard = small_store(tmp_path / "s", rng)
    sound = shard.read_bytes()
    for size in rng.permutation(len(sound))[:200].tolist():
        shard.write_bytes(sound[:size])
        with pytest.raises(StoreError):
            read_all(tmp_path / "s", corpus)
    assert len(verify_store(tmp_path / "s")) == 1


def test_swapped_shards_are_reported(tmp_path, rng):
    corpus = RandomCorpus(rng, 8, VOCAB)
    for first in (0, 4):
        with open_writer(tmp_path, corpus, documents=range(first, first + 4)) as writer:
            for document in range(first, first + 4):
                rows = random_rows(rng, int(corpus.document_lengths[document]), VOCAB, 4)
                writer.append(document, 0, rows)
    a, b = sorted(tmp_path.glob("*.shard"))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    with pytest.raises(StoreError, match="renamed or comes from another store"):
        LogitStore(tmp_path)
    assert len(verify_store(tmp_path)) == 2


def test_other_settings_and_second_writer_are_refused(tmp_path, rng):
    corpus = RandomCorpus(rng, 4, VOCAB)
    with (
        pytest.raises(UserError, match="another process is writing"),
        open_writer(tmp_path, corpus),
    ):
        open_writer(tmp_path, corpus)
    with pytest.raises(StoreError, match="vocab_size"):
        open_writer(tmp_path, corpus, vocab_size=VOCAB + 1)
    with pytest.raises(StoreError, match="overlap"):
        open_writer(tmp_path, corpus, documents=range(1, 3))


def test_unwritable_place_is_a_sentence(tmp_path, rng):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the logit store"):
        open_writer(tmp_path / "file" / "s", RandomCorpus(rng, 4, VOCAB))


def test_torn_tail_is_dropped_on_resume(tmp_path, rng):
    corpus = RandomCorpus(rng, 10, VOCAB)
    rows = [random_rows(rng, int(n), VOCAB, 4) for n in corpus.document_lengths]
    writer = open_writer(tmp_path, corpus)
    for document in range(5):
        writer.append(document, 0, rows[document])
        writer.flush()
    writer.abandon()
    partial = next(tmp_path.glob("*.partial"))
    with open(partial, "ab") as file:
        file.write(rng.bytes(100))
    with open_writer(tmp_path, corpus) as writer:
        for document in range(10):
            done = writer.written(document)
            assert done == (len(rows[document]) if document < 5 else 0)
            writer.append(document, done, rows[document][done:])
    store = LogitStore(tmp_path)
    store.check_corpus(corpus, full=True)
    for document in range(10):
        assert_rows_equal(store.read(document), rows[document])


DOCUMENTS, SEED = 40, 11


def write_and_acknowledge(path: Path) -> None:
    """Runs in a process that will be killed: says on stdout what flush() returned for."""
    rng = np.random.default_rng(SEED)
    corpus = RandomCorpus(rng, DOCUMENTS, VOCAB, mean=20)
    rows = [random_rows(rng, int(n), VOCAB, 4) for n in corpus.document_lengths]
    with open_writer(path, corpus) as writer:
        for document in range(DOCUMENTS):
            done = writer.written(document)
            if done < len(rows[document]):
                writer.append(document, done, rows[document][done:])
                writer.flush()
            print(document, flush=True)


def test_killed_writer_loses_nothing_acknowledged(tmp_path, rng):
    expected_rng = np.random.default_rng(SEED)
    corpus = RandomCorpus(expected_rng, DOCUMENTS, VOCAB, mean=20)
    rows = [random_rows(expected_rng, int(n), VOCAB, 4) for n in corpus.document_lengths]
    for kill in range(10):
        path = tmp_path / str(kill)
        acknowledged = _killed_run(path, float(rng.uniform(0, 0.06)))
        writer = open_writer(path, corpus)
        for document in acknowledged:
            assert writer.written(document) == len(rows[document])
        writer.abandon()
        write_and_acknowledge(path)
        assert verify_store(path) == []
        for document in range(DOCUMENTS):
            assert_rows_equal(LogitStore(path).read(document), rows[document])


def _killed_run(path: Path, delay: float) -> list[int]:
    """Kills a writer `delay` seconds after its first word; the documents it acknowledged."""
    child = subprocess.Popen(
        [sys.executable, __file__, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    words = (first + child.stdout.read()).splitlines(keepends=True)
    child.stdout.close()
    child.wait()
    return [int(word) for word in words if word.endswith("\n")]


if __name__ == "__main__":
    write_and_acknowledge(Path(sys.argv[1]))

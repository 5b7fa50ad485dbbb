"""Rows come back as they went in, whatever the order, the pieces and the shards."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows

VOCAB = 997


def write_store(
    path: Path,
    rng: np.random.Generator,
    corpus: RandomCorpus,
    bounds: list[int],
    codec: str = "exact",
    **options,
) -> dict[int, TeacherRows]:
    """Writes shards between `bounds`, documents in random order, in random pieces and flushes."""
    expected = {
        document: random_rows(rng, int(n), VOCAB, 12)
        for document, n in enumerate(corpus.document_lengths)
    }
    for first, last in itertools.pairwise(bounds):
        with LogitStoreWriter(
            path,
            vocab_size=VOCAB,
            document_lengths=corpus.document_lengths,
            metadata={"teacher": "random"},
            corpus=corpus,
            documents=range(first, last),
            codec=codec,
            **options,
        ) as writer:
            for document in rng.permutation(np.arange(first, last)).tolist():
                rows = expected[document]
                cuts = np.sort(rng.integers(0, len(rows) + 1, 2)).tolist()
                for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                    writer.append(document, start, rows[start:stop])
                if rng.random() < 0.1:
                    writer.flush()
                    assert writer.written(document) == len(rows)
    return expected


def test_random_access(tmp_path, rng):
    corpus = RandomCorpus(rng, 60, VOCAB)
    expected = write_store(tmp_path / "c.pd", rng, corpus, [0, 25, 25, 60])
    store = LogitStore(tmp_path / "c.pd")
    store.check_corpus(corpus, full=True)
    np.testing.assert_array_equal(store.document_lengths, corpus.document_lengths)
    assert store.metadata == {"teacher": "random"} and store.vocab_size == VOCAB
    assert store.num_rows == corpus.document_lengths.sum()
    assert store.num_entries == sum(rows.counts.sum() for rows in expected.values())
    assert store.max_count == max(rows.counts.max(initial=0) for rows in expected.values())
    for document, rows in expected.items():
        start = int(rng.integers(0, len(rows) + 1))
        stop = int(rng.integers(start, len(rows) + 1))
        assert_rows_equal(store.read(document), rows)
        assert_rows_equal(store.read(document, start, stop - start), rows[start:stop])


def test_gather_cuts_and_pads(tmp_path, rng):
    corpus = RandomCorpus(rng, 20, VOCAB)
    expected = write_store(tmp_path / "c.pd", rng, corpus, [0, 20])
    store = pickle.loads(pickle.dumps(LogitStore(tmp_path / "c.pd")))
    spans = np.array([(d, n // 3, n - n // 3) for d, n in enumerate(corpus.document_lengths)])
    rows = TeacherRows.concatenate([expected[d][int(o) : int(o + n)] for d, o, n in spans])
    for width in (1, 5, 12, 20):
        ids = np.full((len(rows), width), 7, np.int32)
        logprobs = np.full((len(rows), width), 7, np.float32)
        counts = np.full(len(rows), 7, np.int32)
        store.gather(spans, ids, logprobs, counts)
        cut = TeacherRows(
            rows.ids[:, :width], rows.logprobs[:, :width], np.minimum(rows.counts, width)
        )
        assert_rows_equal(TeacherRows(ids, logprobs, counts), cut)


def test_threads_and_forked_workers_read_at_once(tmp_path, rng):
    """Eight threads on one store; processes forked while they read, as a DataLoader's are."""
    corpus = RandomCorpus(rng, 60, VOCAB)
    expected = write_store(tmp_path, rng, corpus, [0, 20, 40, 60], codec="compact")
    store, alone = LogitStore(tmp_path), LogitStore(tmp_path)
    rows = {document: alone.read(document) for document in expected}

    def read_all(seed: int) -> None:
        for document in np.random.default_rng(seed).permutation(60).tolist():
            found, there = store.read(document), rows[document]
            assert (found.ids == there.ids).all() and (found.counts == there.counts).all()
            assert (found.logprobs == there.logprobs).all()

    with ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(read_all, seed) for seed in range(24)]
        for seed in range(8):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    signal.alarm(60)  # a lost lock would hang it
                    read_all(seed)
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
        for done in reading:
            done.result()


def test_missing_shard_is_refused_or_reads_empty(tmp_path, rng):
    corpus = RandomCorpus(rng, 20, VOCAB)
    expected = write_store(tmp_path / "c.pd", rng, corpus, [0, 8])
    with pytest.raises(StoreError, match="12 of 20 documents are missing, first 8 to 19"):
        LogitStore(tmp_path / "c.pd")
    store = LogitStore(tmp_path / "c.pd", allow_partial=True)
    assert store.missing_documents() == [range(8, 20)]
    assert_rows_equal(store.read(3), expected[3])
    assert_rows_equal(store.read(9, 0, 4), TeacherRows.empty(4))


def test_other_corpus_is_refused(tmp_path, rng):
    corpus = RandomCorpus(rng, 20, VOCAB)
    write_store(tmp_path / "c.pd", rng, corpus, [0, 20])
    longest = int(np.argmax(corpus.document_lengths))
    store = LogitStore(tmp_path / "c.pd")
    for full in (False, True):
        store.check_corpus(corpus, full=full)
    corpus.tokens(longest)[-1] ^= 1
    for full in (False, True):
        with pytest.raises(StoreError, match=f"document {longest} has other tokens"):
            store.check_corpus(corpus, full=full)
        corpus.document_lengths[longest] += 1
        with pytest.raises(StoreError, match=f"document {longest} has other length"):
            store.check_corpus(corpus, full=full)
        corpus.document_lengths[longest] -= 1
    other = RandomCorpus(rng, 21, VOCAB)
    with pytest.raises(StoreError, match="a corpus of 20 documents, this one has 21"):
        store.check_corpus(other)


def test_full_check_compares_what_a_sample_leaves_out(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("megatron_pd.store.reader._SAMPLED_DOCUMENTS", 2)  # the first and the last
    corpus = RandomCorpus(rng, 20, VOCAB)
    write_store(tmp_path / "c.pd", rng, corpus, [0, 20])
    store = LogitStore(tmp_path / "c.pd")
    inner = 1 + int(np.argmax(corpus.document_lengths[1:-1]))
    corpus.tokens(inner)[0] ^= 1
    store.check_corpus(corpus)
    with pytest.raises(StoreError, match=f"document {inner} has other tokens"):
        store.check_corpus(corpus, full=True)


def test_lengths_of_documents_that_no_shard_holds_count_too(tmp_path, rng):
    corpus = RandomCorpus(rng, 20, VOCAB)
    write_store(tmp_path / "c.pd", rng, corpus, [0, 8])
    store = LogitStore(tmp_path / "c.pd", allow_partial=True)
    store.check_corpus(corpus)
    corpus.document_lengths[12] += 1
    with pytest.raises(StoreError, match="in documents that no shard holds yet"):
        store.check_corpus(corpus)


def test_gather_fills_statistics(tmp_path, rng):
    lengths = np.array([5, 7])
    rows = [random_rows(rng, int(n), VOCAB, 6, statistics=True) for n in lengths]
    with LogitStoreWriter(
        tmp_path,
        vocab_size=VOCAB,
        document_lengths=lengths,
        metadata={},
        codec="exact",
        statistics=["entropy", "label_logprob"],
    ) as writer:
        for document in (1, 0):
            writer.append(document, 0, rows[document])
    statistics = {name: np.zeros(8, np.float32) for name in ("entropy", "std")}
    store = LogitStore(tmp_path)
    spans = np.array([(1, 2, 5), (0, 0, 3)])
    outputs = np.zeros((8, 6), np.int32), np.zeros((8, 6), np.float32), np.zeros(8, np.int32)
    store.gather(spans, *outputs, out_statistics=statistics)
    expected = np.r_[rows[1].statistics["entropy"][2:], rows[0].statistics["entropy"][:3]]
    np.testing.assert_array_equal(statistics["entropy"], expected)
    assert np.isnan(statistics["std"]).all()
    with pytest.raises(StoreError, match="the spans have 8 rows, the buffers 7"):
        store.gather(spans, *(output[:7] for output in outputs))


def dense_kl(given: TeacherRows, decoded: TeacherRows) -> np.ndarray:
    """KL(given || decoded) of every row in nats, the mass of no entry as one more outcome."""
    entries = np.arange(given.ids.shape[1]) < given.counts[:, None]
    given_log, decoded_log = (
        np.where(entries, rows.logprobs[:, : given.ids.shape[1]].astype(np.float64), 0.0)
        for rows in (given, decoded)
    )
    given_p, decoded_p = np.exp(given_log) * entries, np.exp(decoded_log) * entries
    tail, decoded_tail = (np.clip(1 - p.sum(1), 0, 1) for p in (given_p, decoded_p))
    kl = (given_p * (given_log - decoded_log)).sum(1)
    return kl + np.where(tail > 0, tail * np.log(np.maximum(tail, 1e-30) / decoded_tail), 0.0)


@pytest.mark.parametrize("value_bits", [8, 10, 14])
def test_compact_keeps_ids_and_nearly_all_of_the_distribution(tmp_path, rng, value_bits):
    corpus = RandomCorpus(rng, 60, VOCAB)
    expected = write_store(
        tmp_path, rng, corpus, [0, 25, 60], codec="compact", value_bits=value_bits
    )
    store = LogitStore(tmp_path)
    kl = []
    for document, rows in expected.items():
        found = store.read(document)
        np.testing.assert_array_equal(found.counts, rows.counts)
        assert_rows_equal(found, rows, exact=False)
        assert (np.diff(found.logprobs, axis=1)[found.ids[:, 1:] >= 0] <= 0).all()
        kl.append(dense_kl(rows, TeacherRows.concatenate([found, TeacherRows.empty(0, 12)])))
    steps, outcomes = 75 * 2 ** (value_bits - 8), 12 + 1
    assert np.concatenate(kl).max() <= 0.52 * outcomes / steps**2 + 1e-6
    assert np.concatenate(kl).mean() <= 0.52 * outcomes / steps**2 / 3


def test_runs_of_documents_are_their_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    """Rows appended and read over the documents' ends, in pieces of any size."""
    corpus = RandomCorpus(rng, 200, 50, mean=3)
    lengths = corpus.document_lengths
    documents = [random_rows(rng, int(n), 50, 4) for n in lengths]
    every = TeacherRows.concatenate(documents)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.unique(rng.integers(0, len(every), 40))
    cuts = np.unique(np.concatenate([[0], cuts, [len(every)]]))
    with LogitStoreWriter(
        tmp_path / "s",
        vocab_size=50,
        document_lengths=lengths,
        metadata={},
        codec="exact",
        corpus=corpus,
    ) as writer:
        for row, end in itertools.pairwise(cuts.tolist()):
            document = int(np.searchsorted(starts, row, "right")) - 1
            offset = row - int(starts[document])
            with pytest.raises(StoreError, match="out of turn"):
                writer.append_run(document, offset + 1, every[row:end])
            writer.append_run(document, offset, every[row:end])
    store = LogitStore(tmp_path / "s")
    store.check_corpus(corpus, full=True)
    for document, rows in enumerate(documents):
        assert_rows_equal(store.read(document), rows)
    first, stop = np.sort(rng.integers(0, len(lengths) + 1, 2)).tolist()
    row = int(starts[first])
    for document, offset, rows in store.scan(range(first, stop), int(rng.integers(1, 50))):
        assert starts[document] + offset == row
        assert_rows_equal(rows, every[row : row + len(rows)])
        row += len(rows)
    assert row == starts[stop]


def test_a_run_passes_over_what_is_there(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever an earlier writer left: whole documents, parts of them, none."""
    corpus = RandomCorpus(rng, 60, 50, mean=4)
    lengths = corpus.document_lengths
    documents = [random_rows(rng, int(n), 50, 4) for n in lengths]
    settings = {
        "vocab_size": 50,
        "document_lengths": lengths,
        "metadata": {},
        "codec": "exact",
        "corpus": corpus,
    }
    done = np.where(rng.random(60) < 0.5, rng.integers(0, lengths + 1), 0)
    writer = LogitStoreWriter(tmp_path / "s", **settings)
    for document in rng.permutation(60):
        if done[document]:
            writer.append(document, 0, documents[document][: done[document]])
    writer.flush()
    writer.abandon()
    rows = TeacherRows.concatenate(documents)
    starts = np.cumsum(lengths) - lengths
    for document, n in enumerate(done):  # which needn't have been computed again
        rows.counts[starts[document] : starts[document] + n] = 0
    half = int(rng.integers(60))
    with LogitStoreWriter(tmp_path / "s", **settings) as writer:
        np.testing.assert_array_equal(writer.written_rows, done)
        parts = [(0, rows[: starts[half]]), (half, rows[starts[half] :])]
        added = [writer.append_run(document, 0, part) for document, part in parts]
        assert added == [(lengths - done)[:half].sum(), (lengths - done)[half:].sum()]
        assert writer.append_run(0, 0, rows) == 0
        with pytest.raises(StoreError, match="out of turn"):
            writer.append_run(half, 0, rows)  # beyond the last document
    store = LogitStore(tmp_path / "s")
    store.check_corpus(corpus, full=True)
    for document, expected in enumerate(documents):
        assert_rows_equal(store.read(document), expected)


def test_a_run_with_a_last_row_that_has_entries(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = TeacherRows.concatenate([random_rows(rng, n, 50, 4) for n in (2, 3, 2)])
    while not rows.counts[3]:
        rows = TeacherRows.concatenate([random_rows(rng, n, 50, 4) for n in (2, 3, 2)])
    with (
        pytest.raises(StoreError, match=r"document 1, offset 1: the document's last row has"),
        LogitStoreWriter(
            tmp_path / "s", vocab_size=50, document_lengths=np.array([2, 2, 3]), metadata={}
        ) as writer,
    ):
        writer.append_run(0, 0, rows)

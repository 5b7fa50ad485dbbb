"""Rows in the order of a run become stores: against a dictionary of (document, offset) → row."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, StoreError, TeacherRows
from megatron_pd.teacher.journal import collect
from megatron_pd.teacher.journal.collect import captured_stores, collections_of
from megatron_pd.teacher.journal.segments import (
    Journal,
    fingerprint_of,
    segment_name,
    spans_of,
    write_segment,
)

VOCAB, WIDTH = 1000, 5
Part = tuple[np.ndarray, int, TeacherRows]


class Run:
    """Two random corpora, and a journal that grows; `expected` has what counts."""

    def __init__(self, folder: Path) -> None:
        self.rng = np.random.default_rng()
        self.prefixes = [str(folder / name) for name in ("one", "two")]
        self.lengths = [self.rng.integers(1, 40, 30), self.rng.integers(1, 90, 12)]
        for prefix, lengths in zip(self.prefixes, self.lengths, strict=True):
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
            for length in lengths:
                builder.add_document(self.rng.integers(0, VOCAB, length), [length])
            builder.finalize(f"{prefix}.idx")
        self.description = {
            "corpora": self.prefixes,
            "fingerprints": [fingerprint_of(MegatronCorpus(prefix)) for prefix in self.prefixes],
            "vocab_size": VOCAB,
            "draws": 0,
            "codec": "exact",
            "value_bits": 10,
            "row_statistics": ["label_logprob"],
            "teacher": {"teacher": "random", "top_k": WIDTH},
        }
        self.path = folder / "journal"
        self.journal = Journal.begin(self.path, self.description)
        self.expected: dict[tuple[int, int, int], tuple[int, np.ndarray, np.ndarray, float]] = {}
        self.stores = captured_stores(folder / "stores", self.prefixes)

    def part(self, iteration: int) -> Part:
        """The rows of one sequence: some spans of documents, and padding."""
        addresses = []
        for _ in range(self.rng.integers(1, 5)):
            corpus = int(self.rng.integers(2))
            document = int(self.rng.integers(len(self.lengths[corpus])))
            length = int(self.lengths[corpus][document]) - 1
            start, stop = np.sort(self.rng.integers(0, length + 1, 2)).tolist()
            addresses += [(corpus, document, offset) for offset in range(start, stop)]
            addresses += [(-1, -1, -1)] * int(self.rng.integers(2))
        rows = self.rows(len(addresses))
        for row, address in enumerate(addresses):
            if address[0] >= 0:
                count = rows.counts[row]
                entry = (rows.ids[row, :count], rows.logprobs[row, :count])
                label = float(rows.statistics["label_logprob"][row])
                self.expected[address] = (iteration, *entry, label)
        return np.array(addresses, np.int64).reshape(-1, 3), iteration, rows

    def rows(self, n: int) -> TeacherRows:
        counts = self.rng.integers(1, WIDTH + 1, n).astype(np.int32)
        filled = np.arange(WIDTH) < counts[:, None]
        ids = self.rng.permuted(np.tile(np.arange(VOCAB), (n, 1)), axis=1)[:, :WIDTH]
        logprobs = -np.sort(-np.log(self.rng.dirichlet(np.ones(WIDTH + 1), n)))[:, :WIDTH]
        return TeacherRows(
            np.where(filled, ids, -1).astype(np.int32),
            np.where(filled, -np.sort(-logprobs, axis=1), 0).astype(np.float32),
            counts,
            {"label_logprob": -self.rng.random(n).astype(np.float32)},
        )

    def write(self, run: Path, rank: int, number: int, iterations: range) -> None:
        parts = [self.part(iteration) for iteration in iterations]
        write_segment(run / segment_name(f"rank{rank}", number), parts, self.description)

    def collect(self) -> None:
        for each in collections_of(Journal(self.path), self.stores):
            for documents in each.shards:
                each.write(documents)

    def check(self) -> None:
        for number, (prefix, lengths) in enumerate(zip(self.prefixes, self.lengths, strict=True)):
            store = LogitStore(self.stores[prefix])
            store.check_corpus(MegatronCorpus(prefix), full=True)
            for document, length in enumerate(lengths.tolist()):
                rows = store.read(document)
                for offset in range(length):
                    found = self.expected.get((number, document, offset))
                    assert rows.counts[offset] == (0 if found is None else len(found[1]))
                    if found is not None:
                        count = len(found[1])
                        np.testing.assert_array_equal(rows.ids[offset, :count], found[1])
                        np.testing.assert_array_equal(rows.logprobs[offset, :count], found[2])
                        assert rows.statistics["label_logprob"][offset] == np.float32(found[3])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_last_iteration_wins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_GROUP_TOKENS", 50)
    monkeypatch.setattr(
        collect, "plan_shards", lambda lengths: [range(0, 7), range(7, len(lengths))]
    )
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 30))
    run.write(first, 1, 0, range(30, 40))
    run.write(first, 0, 1, range(40, 45))
    run.collect()
    run.check()
    iterations = LogitStore(run.stores[run.prefixes[0]]).metadata["iterations"]
    assert iterations == [1, 44]


def test_what_a_run_wrote_beyond_its_checkpoint_does_not_count(run: Run) -> None:
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 6))
    kept = dict(run.expected)
    run.write(first, 0, 1, range(6, 30))  # no checkpoint saw these
    run.write(run.journal.begin_run(20), 0, 0, range(21, 25))  # nor these
    run.expected = kept
    third = run.journal.begin_run(5)
    run.write(third, 0, 0, range(6, 9))
    run.collect()
    run.check()


def test_a_segment_of_mixed_iterations_counts_in_part(run: Run) -> None:
    first = run.journal.begin_run(0)
    parts = [run.part(iteration) for iteration in range(1, 10)]
    kept = dict(run.expected)
    parts += [run.part(iteration) for iteration in range(10, 20)]
    run.expected = kept
    write_segment(first / segment_name("rank0", 0), parts, run.description)
    run.journal.begin_run(9)
    run.collect()
    run.check()


def test_what_was_not_whole_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 5))
    kept = dict(run.expected)
    monkeypatch.setattr("megatron_pd.teacher.journal.segments._rename", stop)
    with pytest.raises(KeyboardInterrupt):
        run.write(first, 0, 1, range(5, 9))
    run.expected = kept
    (first / ".rank0-00000001.elsewhere.1").mkdir()  # of a process that was killed
    run.collect()
    run.check()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_leaves_what_was_written(run: Run) -> None:
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 5))
    kept = dict(run.expected)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(run.rng.integers(100, 3000)), limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot write the logit store"):
            run.write(first, 0, 1, range(5, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(first) == [segment_name("rank0", 0)]
    run.expected = kept
    run.collect()
    run.check()


def test_interrupted_collection_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_GROUP_TOKENS", 20)
    monkeypatch.setattr(collect, "_FLUSH_ROWS", 20)
    run.write(run.journal.begin_run(0), 0, 0, range(1, 30))
    rows_of, left = collect.Collection._rows, int(run.rng.integers(1, 20))

    def stopping(self, *arguments):
        nonlocal left
        left -= 1
        return rows_of(self, *arguments) if left else stop()

    monkeypatch.setattr(collect.Collection, "_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.collect()
    monkeypatch.setattr(collect.Collection, "_rows", rows_of)
    run.collect()
    run.check()


def test_damage_is_found(run: Run) -> None:
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 5))
    path = first / segment_name("rank0", 0) / "spans.npy"
    data = bytearray(path.read_bytes())
    data[int(run.rng.integers(len(data)))] ^= 1 << int(run.rng.integers(8))
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"spans\.npy: damaged"):
        run.collect()
    path.unlink()
    with pytest.raises(StoreError, match=r"spans\.npy"):
        run.collect()
    (run.path / "journal.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"journal\.json: damaged"):
        run.collect()


def test_other_rows_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match="nothing to collect"):
        run.collect()
    first = run.journal.begin_run(0)
    run.write(first, 0, 0, range(1, 9))
    run.collect()
    run.write(first, 0, 1, range(9, 12))
    with pytest.raises(UserError, match=r"store of other rows, of iterations \[1, 8\]"):
        run.collect()
    with pytest.raises(StoreError, match="begun with vocab_size 1000, now 999"):
        Journal.begin(run.path, {**run.description, "vocab_size": 999})
    for path in run.stores.values():
        shutil.rmtree(path)
    with open(f"{run.prefixes[1]}.bin", "r+b") as file:
        file.write(b"\x01\x02")
    with pytest.raises(UserError, match="not the tokens that the run read"):
        run.collect()


def test_corpora_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"both be text\.pd"):
        captured_stores(tmp_path, ["/a/text", "/b/text"])


def test_spans() -> None:
    addresses = np.array([(0, 3, 5), (0, 3, 6), (0, 4, 7), (0, 3, 7), (1, 3, 8), (0, 3, 8)])
    spans = spans_of(addresses, np.array([1, 1, 1, 1, 1, 2]))
    assert spans.tolist() == [
        [0, 3, 5, 2, 1, 0],
        [0, 3, 7, 1, 1, 3],
        [0, 3, 8, 1, 2, 5],
        [0, 4, 7, 1, 1, 2],
        [1, 3, 8, 1, 1, 4],
    ]

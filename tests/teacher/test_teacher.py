"""Any teacher can fill a store: a dump with one that is neither Megatron's nor a neural model."""

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.windows import Batch, Windows
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.store.codecs import Codec, ExactCodec
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.teacher import dump as dump_module
from megatron_pd.teacher.capture import capture_rows, rows_of_windows
from megatron_pd.teacher.dump import dump
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.fingerprint import content_fingerprint
from megatron_pd.teacher.protocol import Teacher

VOCAB_SIZE = 40


class BigramTeacher:
    """p(next | token) from a random table; it counts the tokens that it has seen."""

    vocab_size = VOCAB_SIZE
    length_multiple = 1
    replica, replicas, writes = 0, 1, True

    def __init__(self, table: np.ndarray, fail_after: int = 1 << 60) -> None:
        self.logprobs = table - np.log(np.exp(table).sum(1, keepdims=True))
        self.tokens = 0
        self._fail_after = fail_after

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"teacher": "bigram", "fingerprint": f"{self.logprobs.sum():.9f}"}

    def run(self, batch: Batch, config: DumpConfig) -> TeacherRows | None:
        self.tokens += int(batch.windows.lengths.sum())
        if self.tokens > self._fail_after:
            raise KeyboardInterrupt
        tokens, labels = (values[batch.filled].numpy() for values in (batch.tokens, batch.labels))
        return self.rows_of(tokens, labels, config)

    def rows_of(self, tokens: np.ndarray, labels: np.ndarray, config: DumpConfig) -> TeacherRows:
        logprobs = self.logprobs[tokens]
        order = np.argsort(-logprobs, axis=1, kind="stable")[:, : config.top_k]
        top = np.take_along_axis(logprobs, order, 1).astype(np.float32)
        counts = np.full(len(tokens), order.shape[1], np.int32)
        label = np.take_along_axis(logprobs, labels[:, None], 1)[:, 0].astype(np.float32)
        return TeacherRows(order.astype(np.int32), top, counts, {"label_logprob": label})

    def share(self, values: np.ndarray | None) -> np.ndarray:
        assert values is not None
        return values


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng()
    lengths = [1, 2, 7, 8, 9, 30, *rng.integers(1, 60, 20)]
    return [rng.integers(0, VOCAB_SIZE, length) for length in lengths]


def written(prefix: Path, documents: list[np.ndarray]) -> MegatronCorpus:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return MegatronCorpus(str(prefix))


@pytest.fixture
def corpus(tmp_path: Path, documents: list[np.ndarray]) -> MegatronCorpus:
    return written(tmp_path / "corpus", documents)


@pytest.fixture
def config() -> DumpConfig:
    return DumpConfig(sequence_length=8, batch_size=3, overlap=3, top_p=1.0, top_k=5, codec="exact")


def random_teacher(table: np.ndarray | None = None, **options: Any) -> BigramTeacher:
    if table is None:
        table = np.random.default_rng().normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    return BigramTeacher(table, **options)


def assert_store_is_the_teachers(
    store: LogitStore, teacher: BigramTeacher, documents: list[np.ndarray], config: DumpConfig
) -> None:
    for number, tokens in enumerate(documents):
        found = store.read(number)
        assert len(found) == len(tokens)
        if not len(tokens):
            continue
        expected = teacher.rows_of(tokens[:-1], tokens[1:], config)
        assert found.counts[-1] == 0
        width = found.ids.shape[1]
        np.testing.assert_array_equal(found.ids[:-1], expected.ids[:, :width])
        np.testing.assert_array_equal(found.logprobs[:-1], expected.logprobs[:, :width])


def test_a_teacher_from_outside_fills_a_store(
    tmp_path: Path, corpus: MegatronCorpus, documents: list[np.ndarray], config: DumpConfig
) -> None:
    teacher: Teacher = random_teacher()
    dump(teacher, corpus, str(tmp_path / "corpus.pd"), config)
    store = LogitStore(tmp_path / "corpus.pd")
    assert_store_is_the_teachers(store, teacher, documents, config)
    store.check_corpus(corpus, full=True)
    wanted = {**teacher.identity, "top_p": 1.0, "top_k": 5, "sequence_length": 8, "overlap": 3}
    assert wanted.items() <= store.metadata.items()


def test_short_documents_in_any_batches_and_after_any_stop(
    tmp_path: Path, config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every store is the same, row for row, whatever the batches were and where a dump stopped."""
    rng = np.random.default_rng()
    lengths = rng.choice([0, 1, 2, 3, 4, 5, 40], 300, p=[0.1, 0.1, 0.2, 0.3, 0.1, 0.15, 0.05])
    documents = [rng.integers(0, VOCAB_SIZE, length) for length in lengths]
    corpus = written(tmp_path / "short", documents)
    table = rng.normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    monkeypatch.setattr(dump_module, "_GROUP_TOKENS", 100)
    stores = []
    for batch_size in (1, 3, 50):
        path = str(tmp_path / f"{batch_size}.pd")
        settings = dataclasses.replace(config, batch_size=batch_size)
        fail_after = int(rng.integers(1, int(lengths.sum()) // 2))
        with pytest.raises(KeyboardInterrupt):
            dump(random_teacher(table, fail_after=fail_after), corpus, path, settings)
        whole = LogitStoreWriter(
            path,
            vocab_size=VOCAB_SIZE,
            document_lengths=lengths,
            metadata={**random_teacher(table).identity, **settings.identity},
            codec="exact",
            statistics=["label_logprob"],
            corpus=corpus,
        )
        left = np.flatnonzero((whole.written_rows == 0) & (lengths > 1))
        for document in rng.choice(left, 5, replace=False).tolist():  # a kill amid a group
            tokens = documents[document]
            rows = random_teacher(table).rows_of(tokens[:-1], tokens[1:], settings)
            whole.append(document, 0, rows[: int(rng.integers(1, len(tokens)))])
        whole.flush()
        whole.abandon()
        teacher = random_teacher(table)
        dump(teacher, corpus, path, settings)
        stores.append(LogitStore(path))
        assert_store_is_the_teachers(stores[-1], teacher, documents, config)
        stores[-1].check_corpus(corpus, full=True)
    for document in range(len(documents)):
        first, *others = (store.read(document) for store in stores)
        for rows in others:
            np.testing.assert_array_equal(rows.ids, first.ids)
            np.testing.assert_array_equal(rows.logprobs, first.logprobs)
            np.testing.assert_array_equal(
                rows.statistics["label_logprob"], first.statistics["label_logprob"]
            )


class MirroredCodec(Codec):
    """`exact`, back to front."""

    name, version = "mirrored", 1

    def encode(self, rows: RaggedRows) -> bytes:
        return ExactCodec(self.layout, None).encode(rows)[::-1]

    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        return ExactCodec(self.layout, None).decode(stream[::-1], rows, entries)


def test_a_dump_in_a_codec_from_outside(
    tmp_path: Path, corpus: MegatronCorpus, documents: list[np.ndarray], config: DumpConfig
) -> None:
    """What `--dump-codec package.module:attribute` does."""
    teacher: Teacher = random_teacher()
    config = dataclasses.replace(config, codec=f"{__name__}:MirroredCodec")
    dump(teacher, corpus, str(tmp_path / "corpus.pd"), config)
    store = LogitStore(tmp_path / "corpus.pd")
    assert store.codecs == {"mirrored"}
    assert_store_is_the_teachers(store, teacher, documents, config)
    with pytest.raises(UserError, match="The codec 'nowhere:Codec' can't be imported"):
        dataclasses.replace(config, codec="nowhere:Codec")


def test_a_stopped_dump_goes_on_and_only_with_the_same_teacher(
    tmp_path: Path,
    corpus: MegatronCorpus,
    documents: list[np.ndarray],
    config: DumpConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dump_module, "_GROUP_TOKENS", 20)
    path = str(tmp_path / "corpus.pd")
    teacher = random_teacher(fail_after=150)
    with pytest.raises(KeyboardInterrupt):
        dump(teacher, corpus, path, config)
    with pytest.raises(StoreError, match="begun with"):
        dump(random_teacher(), corpus, path, config)
    for name, was, now in (
        ("overlap", 3, 2),
        ("top_k", 5, 4),
        ("statistics", False, True),
        ("codec", "exact", "compact"),
        ("value_bits", 10, 11),
        ("sequence_length", 8, 7),
    ):
        other = dataclasses.replace(config, **{name: now})
        with pytest.raises(StoreError, match=f"was begun with {name}={was!r}, now {name}={now!r}"):
            dump(teacher, corpus, path, other)
    other = dataclasses.replace(config, overlap=2, top_k=4)
    with pytest.raises(
        StoreError, match="begun with overlap=3, now overlap=2; was begun with top_k=5, now top_k=4"
    ):
        dump(teacher, corpus, path, other)
    again = BigramTeacher(teacher.logprobs)
    dump(again, corpus, path, config)
    assert_store_is_the_teachers(LogitStore(path), again, documents, config)
    whole = random_teacher()
    dump(whole, corpus, str(tmp_path / "whole.pd"), config)
    assert again.tokens < whole.tokens


@pytest.mark.parametrize("stopped", [False, True])
def test_a_dump_of_a_changed_corpus_names_what_differs(
    tmp_path: Path,
    corpus: MegatronCorpus,
    documents: list[np.ndarray],
    config: DumpConfig,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    """Over a finished store, and over one that a dump goes on with."""
    monkeypatch.setattr(dump_module, "_GROUP_TOKENS", 20)
    path = str(tmp_path / "corpus.pd")
    teacher = random_teacher(fail_after=150 if stopped else 1 << 60)
    with pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
        dump(teacher, corpus, path, config)
    changed = [tokens.copy() for tokens in documents]
    changed[3][5] ^= 1
    longer = [*documents, documents[0]]
    for name, other, sentence in (
        ("changed", changed, "document 3 has other tokens now"),
        ("longer", longer, f"a corpus of {len(documents)} documents and .* now one of "),
    ):
        with pytest.raises(StoreError, match=f"begun with .*{sentence}"):
            dump(teacher, written(tmp_path / name, other), path, config)
    if not stopped:
        dump(teacher, corpus, path, config)  # nothing left to do


def test_a_teacher_that_was_moved_is_the_same(
    tmp_path: Path, corpus: MegatronCorpus, config: DumpConfig
) -> None:
    class Moved(BigramTeacher):
        @property
        def identity(self) -> Mapping[str, Any]:
            return {**super().identity, "teacher": "elsewhere"}

    teacher = random_teacher(fail_after=150)
    path = str(tmp_path / "corpus.pd")
    dump(BigramTeacher(teacher.logprobs), corpus, path, config)
    dump(Moved(teacher.logprobs), corpus, path, config)
    assert LogitStore(path).metadata["teacher"] == "bigram"


@pytest.mark.parametrize("method", ["append_run", "flush", "close"])
def test_a_failed_write_ends_the_dump_and_the_next_goes_on(
    tmp_path: Path,
    corpus: MegatronCorpus,
    documents: list[np.ndarray],
    config: DumpConfig,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """Writing is done beside the teacher; in every group and shard it may be the last one."""
    monkeypatch.setattr(dump_module, "_GROUP_TOKENS", 20)
    monkeypatch.setattr(dump_module, "shards_of", lambda lengths: even_ranges(lengths, 3))
    write, path, teacher = getattr(LogitStoreWriter, method), str(tmp_path / "s"), random_teacher()
    calls = 0

    def counting(writer: LogitStoreWriter, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return write(writer, *arguments)

    monkeypatch.setattr(LogitStoreWriter, method, counting)
    dump(teacher, corpus, str(tmp_path / "whole"), config)
    assert calls >= 3

    for failing in range(calls):
        left = failing

        def full(writer: LogitStoreWriter, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if method == "close":
                    writer.abandon()  # as it does itself
                raise StoreError("the disk is full")
            return write(writer, *arguments)

        monkeypatch.setattr(LogitStoreWriter, method, full)
        with pytest.raises(StoreError, match="the disk is full"):
            dump(teacher, corpus, f"{path}{failing}", config)
        monkeypatch.setattr(LogitStoreWriter, method, write)
        dump(teacher, corpus, f"{path}{failing}", config)
        assert_store_is_the_teachers(LogitStore(f"{path}{failing}"), teacher, documents, config)


class SlowTeacher(BigramTeacher):
    """One of two replicas; counts the tokens it was given, and waits `delay` seconds a batch."""

    replicas = 2

    def __init__(self, table: np.ndarray, replica: int, delay: float) -> None:
        super().__init__(table)
        self.replica = replica
        self._delay = delay

    def run(self, batch: Batch, config: DumpConfig) -> TeacherRows | None:
        time.sleep(self._delay)
        return super().run(batch, config)


def test_a_fast_replica_takes_what_a_slow_one_leaves(
    tmp_path: Path,
    corpus: MegatronCorpus,
    documents: list[np.ndarray],
    config: DumpConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither waits for the other; every shard is written once."""
    monkeypatch.setattr(dump_module, "shards_of", lambda lengths: even_ranges(lengths, 13))
    path = str(tmp_path / "corpus.pd")
    table = np.random.default_rng().normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    tokens = multiprocessing.get_context("fork").Array("q", 2)

    def replica(number: int, delay: float) -> None:
        teacher = SlowTeacher(table, number, delay)
        dump(teacher, corpus, path, config)
        tokens[number] = teacher.tokens

    processes = [
        multiprocessing.get_context("fork").Process(target=replica, args=arguments)
        for arguments in ((0, 0.02), (1, 0.4))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_store_is_the_teachers(LogitStore(path), random_teacher(table), documents, config)
    whole = random_teacher(table)
    dump(whole, corpus, str(tmp_path / "whole.pd"), config)
    assert tokens[0] + tokens[1] == whole.tokens
    assert tokens[0] > tokens[1] > 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_teacher_whose_numbers_are_none_is_refused_where_they_arise(
    tmp_path: Path,
    corpus: MegatronCorpus,
    documents: list[np.ndarray],
    config: DumpConfig,
    wrong: float,
) -> None:
    class Broken(BigramTeacher):
        def rows_of(self, tokens: np.ndarray, *rest: Any) -> TeacherRows:
            rows = super().rows_of(tokens, *rest)
            rows.counts[tokens == documents[5][3]] = 0
            return rows

    teacher = Broken(np.random.default_rng().normal(size=(VOCAB_SIZE, VOCAB_SIZE)))
    with pytest.raises(UserError, match=r"bigram gives no distribution at document \d+, offset"):
        dump(teacher, corpus, str(tmp_path / "corpus.pd"), config)
    logits = torch.randn(1, 4, VOCAB_SIZE)
    logits[0, 2, 7] = wrong
    windows = Windows(*(np.array([value]) for value in (11, 20, 4, 21)))
    batch = Batch(windows, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4).long())
    captured = capture_rows(logits, batch.labels, top_k=5, vocab_size=VOCAB_SIZE)
    with pytest.raises(UserError, match="document 11, offset 22 hold NaN or infinity"):
        rows_of_windows(batch, captured)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_p": 0.0}, "--dump-top-p"),
        ({"top_k": 0}, "--dump-top-k"),
        ({"sampled": 0}, "--dump-sampled is 0"),
        ({"sampled": 5, "top_k": 9}, "leave them out"),
        ({"overlap": 64}, r"--dump-overlap is 64.*--seq-length \(64\)"),
        ({"overlap": -1}, "--dump-overlap is -1"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DumpConfig(sequence_length=64, batch_size=8, **settings)


def test_defaults_are_those_of_the_paper() -> None:
    config = DumpConfig(sequence_length=64, batch_size=8)
    assert (config.top_p, config.top_k, config.overlap) == (0.95, 50, 16)
    assert DumpConfig(sequence_length=64, batch_size=8, sampled=50).top_p is None


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    def folder(name: str, big: bytes, small: bytes = b"{}") -> Path:
        path = tmp_path / name
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "weights").write_bytes(big)
        (path / "metadata.json").write_bytes(small)
        return path

    weights = np.random.default_rng().normal(size=1 << 20).astype(np.float32)
    first = content_fingerprint(folder("first", weights.tobytes()))
    assert first == content_fingerprint(folder("copy", weights.tobytes()))
    assert first != content_fingerprint(folder("trained", (weights + 1e-6).tobytes()))
    assert first != content_fingerprint(folder("other", weights.tobytes(), b"[]"))
    assert first != content_fingerprint(folder("cut", weights[:-1].tobytes()))

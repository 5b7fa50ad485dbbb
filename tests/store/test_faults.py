"""Nothing acknowledged is lost, and no damaged byte is read as if it were sound."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows, files
from megatron_pd.store.admin.verify import verify_store

VOCAB, DOCUMENTS = 101, 12


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where that can be had, for these tests sync thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


class Dump:
    """A dump to be done: corpus and rows.  Each attempt signs the rows that it writes."""

    def __init__(self, rng: np.random.Generator, codec: str, documents: int = DOCUMENTS) -> None:
        self.corpus, self.codec = RandomCorpus(rng, documents, VOCAB, mean=9), codec
        self.rows = [random_rows(rng, int(n), VOCAB, 4) for n in self.corpus.document_lengths]
        self.order = rng.permutation(documents).tolist()

    def writer(self, path: Path, **options) -> LogitStoreWriter:
        settings = {
            "vocab_size": VOCAB,
            "document_lengths": self.corpus.document_lengths,
            "metadata": {"teacher": "random"},
            "corpus": self.corpus,
            "codec": self.codec,
            **options,
        }
        return LogitStoreWriter(path, **settings)

    def run(self, path: Path, attempt: int = 0, acknowledge=lambda document: None) -> None:
        """Writes what is missing, flushes after every document and acknowledges it then."""
        with self.writer(path, statistics=["std"]) as writer:
            for document in self.order:
                done, rows = writer.written(document), self.rows[document]
                if done < len(rows):
                    signed = {"std": np.full(len(rows) - done, attempt, np.float32)}
                    part = TeacherRows(rows.ids, rows.logprobs, rows.counts)[done:]
                    signed_part = TeacherRows(part.ids, part.logprobs, part.counts, signed)
                    writer.append(document, done, signed_part)
                    writer.flush()
                    acknowledge(document)

    def check(self, path: Path, attempt_of: dict[int, int]) -> None:
        """The finished store is sound and holds every row, those acknowledged as they were."""
        assert verify_store(path) == []
        store = LogitStore(path)
        store.check_corpus(self.corpus, full=True)
        assert store.num_entries == sum(int(rows.counts.sum()) for rows in self.rows)
        for document, rows in enumerate(self.rows):
            found = store.read(document)
            assert_rows_equal(found, rows, exact=self.codec == "exact")
            if document in attempt_of:
                assert (found.statistics["std"] == attempt_of[document]).all()


@pytest.fixture(params=["exact", "compact"])
def dump(rng, request) -> Dump:
    return Dump(rng, request.param)


# --- damage --------------------------------------------------------------------------------------


def read_all(path: Path, dump: Dump) -> None:
    store = LogitStore(path)
    store.check_corpus(dump.corpus, full=True)
    for document in range(store.num_documents):
        store.read(document)


def test_every_flipped_bit_is_reported(tmp_path, rng, dump):
    dump.run(tmp_path)
    assert verify_store(tmp_path) == []
    for file in tmp_path.iterdir():
        sound = file.read_bytes()
        for position in rng.permutation(8 * len(sound))[:120].tolist():
            damaged = bytearray(sound)
            damaged[position // 8] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(StoreError):
                read_all(tmp_path, dump)
        assert verify_store(tmp_path) != []
        file.write_bytes(sound)


def test_damage_that_no_read_meets_is_reported_by_verify(tmp_path, rng):
    dump = Dump(rng, "compact")
    document = int(dump.corpus.document_lengths.argmax())
    writer = dump.writer(tmp_path)
    writer.append(document, 0, dump.rows[document])
    writer.flush()
    writer.abandon()
    partial = next(tmp_path.glob("*.partial"))
    model_bytes = int.from_bytes(partial.read_bytes()[76:80], "little")
    os.truncate(partial, 64 + 48 + model_bytes)  # a crash left a model without a block
    dump.run(tmp_path)
    assert verify_store(tmp_path) == []
    shard = next(tmp_path.glob("*.shard"))
    damaged = bytearray(shard.read_bytes())
    damaged[64 + 48 + model_bytes // 2] ^= 1
    shard.write_bytes(damaged)
    read_all(tmp_path, dump)
    assert "byte 64 is damaged" in verify_store(tmp_path)[0]


def test_every_truncation_is_reported(tmp_path, rng, dump):
    dump.run(tmp_path)
    shard = next(tmp_path.glob("*.shard"))
    sound = shard.read_bytes()
    for size in rng.permutation(len(sound))[:100].tolist():
        shard.write_bytes(sound[:size])
        with pytest.raises(StoreError):
            LogitStore(tmp_path)
    assert len(verify_store(tmp_path)) == 1


def test_swapped_shards_are_reported(tmp_path, dump):
    for first in (0, 6):
        with dump.writer(tmp_path, documents=range(first, first + 6)) as writer:
            for document in range(first, first + 6):
                writer.append(document, 0, dump.rows[document])
    a, b = sorted(tmp_path.glob("*.shard"))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    with pytest.raises(StoreError, match="renamed or comes from another store"):
        LogitStore(tmp_path)
    assert len(verify_store(tmp_path)) == 2


# --- refusals ------------------------------------------------------------------------------------


def test_other_settings_and_second_writer_are_refused(tmp_path, dump):
    with (
        pytest.raises(UserError, match="another process is writing"),
        dump.writer(tmp_path),
    ):
        dump.writer(tmp_path)
    with pytest.raises(StoreError, match=f"with vocab_size={VOCAB}, now vocab_size={VOCAB + 1}"):
        dump.writer(tmp_path, vocab_size=VOCAB + 1)
    with pytest.raises(StoreError, match=r"was begun with value_bits=\d+, now value_bits=14"):
        dump.writer(tmp_path, value_bits=14)
    with pytest.raises(StoreError, match="overlap"):
        dump.writer(tmp_path, documents=range(1, 3))


def test_unwritable_place_is_a_sentence(tmp_path, dump):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the logit store"):
        dump.writer(tmp_path / "file" / "s")


def test_full_disk(tmp_path, rng):
    """On a real file system of 64 KiB: a sentence, and once there is room the dump goes on."""
    dump = Dump(rng, "compact", documents=400)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a small tmpfs; the fault layer's test covers ENOSPC")
    try:
        (tmp_path / "ballast").write_bytes(bytes(32 << 10))
        acknowledged: dict[int, int] = {}
        with pytest.raises(StoreError, match="the disk is full: free space and start again"):
            dump.run(tmp_path / "s", 0, lambda document: acknowledged.setdefault(document, 0))
        (tmp_path / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        assert acknowledged
        dump.run(tmp_path / "s", 1)
        dump.check(tmp_path / "s", acknowledged)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


# --- death ---------------------------------------------------------------------------------------


def run_in_child(run: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Forks a process that calls run(acknowledge); its id, and the pipe of what it acknowledges."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(lambda document: os.write(sending, bytes([document])) and None)
            status = 0
        finally:
            os._exit(status)
    os.close(sending)
    return child, receiving


def acknowledged_by(child: int, receiving: int) -> list[int]:
    """What a child acknowledged until it ended."""
    with open(receiving, "rb") as pipe:
        documents = list(pipe.read())
    os.waitpid(child, 0)
    return documents


def test_killed_at_random_moments(tmp_path, rng, dump):
    """SIGKILL, up to three times per store: 150 kills for each codec."""
    begin = time.perf_counter()
    dump.run(tmp_path / "whole")
    duration = time.perf_counter() - begin
    kills = 0
    while kills < 150:
        path, attempt_of = tmp_path / str(kills), {}
        for attempt in range(3):
            child = run_in_child(functools.partial(dump.run, path, attempt))
            time.sleep(float(rng.uniform(0, 0.7 * duration)))
            os.kill(child[0], signal.SIGKILL)
            for document in acknowledged_by(*child):
                attempt_of.setdefault(document, attempt)
            kills += 1
        dump.run(path, 3)
        dump.check(path, attempt_of)


class FaultLayer:
    """Stands in for `os` in the writer's file operations: the `at`-th change fails.

    fault   "short": writes half of the bytes, which the caller must notice; an errno: writes half
            and fails; "crash": writes half and the process is gone.
    """

    CHANGES = ("open", "pwrite", "fsync", "ftruncate", "rename", "link")

    def __init__(self, at: int, fault: str | int) -> None:
        self.at, self.fault = at, fault
        self.changes: list[str] = []

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in self.CHANGES:
            return real

        def change(*arguments, **options):
            self.changes.append(name)
            if len(self.changes) - 1 != self.at:
                return real(*arguments, **options)
            done = 0
            if name == "pwrite":
                file, data, offset = arguments
                done = real(file, bytes(data)[: len(data) // 2], offset)
            if self.fault == "short":
                return done if name == "pwrite" and done else real(*arguments, **options)
            if self.fault == "crash":
                os._exit(1)
            raise OSError(self.fault, os.strerror(self.fault))

        return change


@contextlib.contextmanager
def fault(monkeypatch, at: int, kind: str | int) -> Iterator[FaultLayer]:
    layer = FaultLayer(at, kind)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", layer)
        yield layer


def changes_of(monkeypatch, dump: Dump, path: Path) -> list[str]:
    """The names of all changes that a whole dump makes, in order."""
    with fault(monkeypatch, -1, "short") as layer:
        dump.run(path)
    # Every document is written and synced: with fewer the layer would stand in nothing's way.
    for name in ("pwrite", "fsync"):
        assert layer.changes.count(name) >= sum(len(rows) > 0 for rows in dump.rows)
    return layer.changes


def test_every_write_may_be_short(tmp_path, monkeypatch, dump):
    for at in range(len(changes_of(monkeypatch, dump, tmp_path / "whole"))):
        with fault(monkeypatch, at, "short"):
            dump.run(tmp_path / str(at))
        dump.check(tmp_path / str(at), {})


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_write_may_fail(tmp_path, monkeypatch, dump, error):
    """The writer says so, and the next one goes on where the last flush was."""
    for at, change in enumerate(changes_of(monkeypatch, dump, tmp_path / "whole")):
        path, attempt_of = tmp_path / str(at), {}
        # Without hard links, a file is renamed.
        said = contextlib.nullcontext() if change == "link" else pytest.raises(StoreError)
        with fault(monkeypatch, at, error), said:
            dump.run(path, 0, lambda document, seen=attempt_of: seen.setdefault(document, 0))
        dump.run(path, 1)
        dump.check(path, attempt_of)


def test_failed_writer_refuses_to_go_on(tmp_path, monkeypatch, dump):
    writer = dump.writer(tmp_path)
    document = int(dump.corpus.document_lengths.argmax())
    writer.append(document, 0, dump.rows[document])
    with fault(monkeypatch, 0, errno.ENOSPC), pytest.raises(StoreError, match="the disk is full"):
        writer.flush()
    for call in (writer.flush, writer.close, lambda: writer.append(document, 0, dump.rows[0])):
        with pytest.raises(StoreError, match="an earlier write failed or was interrupted"):
            call()


def test_dies_at_every_write_and_loses_the_page_cache(tmp_path, monkeypatch, rng, dump):
    """The machine fails: of what was not synced, any part may be missing, zero or garbage."""
    for at in range(len(changes_of(monkeypatch, dump, tmp_path / "whole"))):
        path, attempt_of = tmp_path / str(at), {}
        durable = tmp_path / f"{at}.durable"
        with fault(monkeypatch, at, "crash"):
            child = run_in_child(functools.partial(run_noting_sizes, dump, path, durable))
        for document in acknowledged_by(*child):
            attempt_of[document] = 0
        for partial in path.glob("*.partial"):
            header = 64 if partial.stat().st_size > 64 else 0  # synced before anything follows it
            lose_some(partial, int(durable.read_text()) if durable.exists() else header, rng)
        dump.run(path, 1)
        dump.check(path, attempt_of)


def run_noting_sizes(dump: Dump, path: Path, durable: Path, acknowledge) -> None:
    """Runs the dump and leaves in `durable` how many bytes of the shard were synced last."""

    def note(document: int) -> None:
        durable.write_text(str(next(path.glob("*.partial")).stat().st_size))
        acknowledge(document)

    dump.run(path, 0, note)


def lose_some(path: Path, durable: int, rng: np.random.Generator) -> None:
    """Bytes behind `durable` become zeros or noise from some point on, or end there."""
    data = bytearray(path.read_bytes())
    cut = int(rng.integers(durable, len(data) + 1))
    lost = len(data) - cut
    data[cut:] = [b"", bytes(lost), rng.bytes(lost)][rng.integers(3)]
    path.write_bytes(data)

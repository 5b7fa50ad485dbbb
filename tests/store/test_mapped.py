"""Finished shards are mapped: without descriptors, and not for ever what they were when opened."""

import mmap
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_rows import assert_rows_equal, random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows

VOCAB = 50
SHARDS = 300


def write_shards(path: Path, rng: np.random.Generator, lengths: list[int]) -> list[TeacherRows]:
    """A shard a document."""
    rows = [random_rows(rng, length, VOCAB, 4) for length in lengths]
    for document, part in enumerate(rows):
        with LogitStoreWriter(
            path,
            vocab_size=VOCAB,
            document_lengths=np.array(lengths),
            metadata={"teacher": "random"},
            codec="exact",
            documents=range(document, document + 1),
        ) as store:
            store.append(document, 0, part)
    return rows


def test_a_mapped_shard_keeps_no_descriptor(tmp_path, rng, monkeypatch):
    path = tmp_path / "s"
    rows = write_shards(path, rng, [3] * SHARDS)
    assert len(list(path.glob("*.shard"))) >= SHARDS
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SHARDS // 2, limits[1]))
    try:
        store = LogitStore(path)
        for document, expected in enumerate(rows):
            assert_rows_equal(store.read(document, 0, 3), expected)
        monkeypatch.setattr(sys, "argv", ["megatron-pd", "verify", str(path)])
        assert main() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("forked", [False, True])
def test_a_shard_that_is_cut_short_while_it_is_open(tmp_path, rng, forked):
    lengths = [40_000, 1]
    rows = write_shards(tmp_path / "s", rng, lengths)
    store = LogitStore(tmp_path / "s")
    assert_rows_equal(store.read(0, 0, 5), TeacherRows(*(a[:5] for a in padded(rows[0]))))
    shard = min((tmp_path / "s").glob("*.shard"), key=lambda file: -file.stat().st_size)

    def check() -> None:
        os.truncate(shard, 4096)
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"{shard.name}.*was cut short, or its disk"):
                store.read(0, 30_000, 10_000)
        assert_rows_equal(store.read(1, 0, 1), rows[1])

    if not forked:
        check()
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def padded(rows: TeacherRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rows.ids, rows.logprobs, rows.counts


def test_what_else_is_cut_short_ends_the_process_as_ever(tmp_path, rng):
    write_shards(tmp_path / "s", rng, [5])
    other = tmp_path / "other"
    other.write_bytes(bytes(3 * mmap.PAGESIZE))
    script = f"""
import faulthandler, mmap, os, sys
from pathlib import Path
from megatron_pd.cli import main
from megatron_pd.store import LogitStore
if sys.argv[1] == "handled": faulthandler.enable()
LogitStore(Path({str(tmp_path / "s")!r})).read(0, 0, 5)
with open({str(other)!r}, "rb") as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate({str(other)!r}, 10)
data[2 * mmap.PAGESIZE]
"""
    for handled in ("plain", "handled"):
        other.write_bytes(bytes(3 * mmap.PAGESIZE))
        ended = subprocess.run(
            [sys.executable, "-c", script, handled], capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == -signal.SIGBUS
        assert ("Fatal Python error: Bus error" in ended.stderr) == (handled == "handled")

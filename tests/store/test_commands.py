"""The store's commands print what the rows say."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from random_rows import random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows
from megatron_pd.store.admin.journal import Journal
from megatron_pd.store.admin.verify import verify_store
from megatron_pd.store.shard import Shard


@pytest.fixture
def store(tmp_path):
    """One document of three tokens: p = (0.5, 0.25), p = (0.8), no teacher."""
    rows = TeacherRows(
        np.array([[7, 3], [2, -1], [-1, -1]], np.int32),
        np.log(np.array([[0.5, 0.25], [0.8, 1], [1, 1]], np.float32)),
        np.array([2, 1, 0], np.int32),
        {"label_logprob": np.log(np.array([0.25, 0.8, 1], np.float32))},
    )
    with LogitStoreWriter(
        tmp_path / "c.pd",
        vocab_size=9,
        document_lengths=np.array([3]),
        metadata={},
        codec="exact",
        statistics=["label_logprob"],
    ) as writer:
        writer.append(0, 0, rows)
    return tmp_path / "c.pd"


def command(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["megatron-pd", *map(str, words)])
    status = main()
    return status, capsys.readouterr().out


def test_stats(store, monkeypatch, capsys):
    status, out = command(monkeypatch, capsys, "stats", store, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["entries"] == 3 and figures["rows_without_teacher"] == 1
    assert figures["mean_kept_mass"] == pytest.approx((0.75 + 0.8) / 2)
    assert figures["teacher_perplexity"] == pytest.approx((0.25 * 0.8) ** -0.5)
    assert figures["bytes"] == sum(file.stat().st_size for file in store.iterdir())


def test_stats_as_text(store, monkeypatch, capsys):
    status, out = command(monkeypatch, capsys, "stats", store)
    figures = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert status == 0 and figures["rows without teacher"] == "1"
    assert figures["mean kept mass"] == f"{(0.75 + 0.8) / 2:.4f}"
    assert figures["entropy"] == "not stored"


def test_inspect(store, monkeypatch, capsys):
    png = store.parent / "h.png"
    words = ("--document", 0, "--top", 1, "--plot", png)
    status, out = command(monkeypatch, capsys, "inspect", store, *words)
    lines = [line.split() for line in out.splitlines()[-3:]]
    assert status == 0 and lines[0] == ["0", "0.750", "2", "7", "0.500"]
    assert lines[2] == ["2", "0.000", "0", "no", "teacher"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_verify_names_the_damage(store, monkeypatch, capsys):
    assert command(monkeypatch, capsys, "verify", store)[0] == 0
    shard = next(store.glob("*.shard"))
    data = bytearray(shard.read_bytes())
    data[64 + 48] ^= 1
    shard.write_bytes(data)
    status, out = command(monkeypatch, capsys, "verify", store, "--json")
    assert status == 1 and "block at byte 64 is damaged" in json.loads(out)["problems"][0]


def test_verify_of_no_store(tmp_path, monkeypatch, capsys):
    status, out = command(monkeypatch, capsys, "verify", tmp_path / "nowhere")
    assert status == 1 and "no logit store here" in out


def test_inspect_json_has_the_window(store, monkeypatch, capsys):
    words = ("--document", 0, "--offset", 1, "--tokens", 1, "--json")
    figures = json.loads(command(monkeypatch, capsys, "inspect", store, *words)[1])
    (token,) = figures["window"]
    assert (token["offset"], token["entries"]) == (1, 1) and figures["statistics"] == [
        "label_logprob"
    ]
    assert token["label_logprob"] == pytest.approx(np.log(0.8), rel=1e-3)
    assert token["candidates"] == [{"id": 2, "probability": pytest.approx(0.8, rel=1e-3)}]


def damage(shard, rng, blocks: int) -> set[int]:
    """Flips a bit in that many blocks of a shard; where these blocks lie."""
    data = bytearray(shard.read_bytes())
    offsets = [match.start() for match in re.finditer(rb"PDBK\x02", bytes(data))]
    chosen = {int(offset) for offset in rng.choice(offsets, blocks, replace=False)}
    for offset in chosen:
        data[offset + 60] ^= 1 << int(rng.integers(8))
    shard.write_bytes(data)
    return chosen


@pytest.fixture
def large(tmp_path):
    """A store of one shard with some 60 blocks."""
    rng = np.random.default_rng()
    lengths = rng.integers(1, 2000, 60)
    rows = random_rows(rng, 2001, 50, 4)
    path = tmp_path / "large.pd"
    with LogitStoreWriter(path, vocab_size=50, document_lengths=lengths, metadata={}) as writer:
        for document, length in enumerate(lengths.tolist()):
            writer.append(document, 0, rows[2001 - length :])
            writer.flush()
    return path


def test_stats_of_a_sample(large, monkeypatch, capsys):
    def figures(*words) -> dict:
        return json.loads(command(monkeypatch, capsys, "stats", large, "--json", *words)[1])

    whole = figures()
    assert figures("--max-rows", whole["rows"]) == whole
    sample = figures("--max-rows", whole["rows"] // 10)
    assert 0 < sample["rows_read"] < whole["rows_read"] / 2
    # Every document ends as the others do.
    assert sample["mean_kept_mass"] == pytest.approx(whole["mean_kept_mass"], rel=0.3)


def test_verify_names_every_bad_block_from_several_processes(large, monkeypatch, capsys):
    monkeypatch.setattr("megatron_pd.store.admin.verify._RUN_BLOCKS", 4)
    bad = damage(next(large.glob("*.shard")), np.random.default_rng(), 7)
    status, out = command(monkeypatch, capsys, "verify", large, "--json", "--workers", 3)
    problems = json.loads(out)["problems"]
    assert status == 1 and len(problems) == 7
    assert {int(re.search(r"at byte (\d+)", problem)[1]) for problem in problems} == bad


def test_verify_goes_on_where_it_was_stopped(large, monkeypatch):
    monkeypatch.setattr("megatron_pd.store.admin.verify._RUN_BLOCKS", 4)
    shard = next(large.glob("*.shard"))
    damage(shard, np.random.default_rng(), 1)
    journal = large.parent / "journal"
    size = shard.stat().st_size
    verify_half(large, journal)
    with open(journal, "a") as file:
        file.write('{"run": "torn')
    checked = []
    monkeypatch.setattr(Shard, "check_block", recorded(checked, Shard.check_block))
    progress = []
    resumed = Journal(journal)
    assert len(verify_store(large, journal=resumed, progress=progress.append)) == 1
    (whole,) = LogitStore(large)._shards
    blocks = whole.footer.blocks
    assert len(checked) < 0.7 * blocks and sum(progress) == size and not journal.exists()
    assert resumed.taken is not None and size / 3 < resumed.taken_units < size
    verify_half(large, journal)
    os.utime(shard)  # as if it had been copied again: what is known of the old file counts no more
    checked.clear()
    again = Journal(journal)
    verify_store(large, journal=again)
    assert len(checked) == blocks and again.taken is None


def verify_half(store: Path, journal: Path) -> None:
    """A check of a store of one shard that is interrupted when it has read half."""
    size, told = next(store.glob("*.shard")).stat().st_size, 0

    def stop_half_way(done: int) -> None:
        nonlocal told
        told += done
        if told > size / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_store(store, journal=Journal(journal), progress=stop_half_way)


def recorded(calls: list, method):
    def call(self, block):
        calls.append(block)
        return method(self, block)

    return call


@pytest.fixture
def half_verified(large, monkeypatch):
    """The large store, of which an interrupted check has read half."""
    monkeypatch.setattr("megatron_pd.store.admin.verify._RUN_BLOCKS", 4)
    verify_half(large, Path(f"{large}.verify-journal"))
    return large


def test_a_flipped_bit_under_the_old_times_is_found(half_verified, monkeypatch, capsys):
    """utime can set the time of modification back, but not the inode's time of change."""
    shard = next(half_verified.glob("*.shard"))
    before = shard.stat()
    damage(shard, np.random.default_rng(), 60)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    status, out = command(monkeypatch, capsys, "verify", half_verified, "--json")
    result = json.loads(out)
    assert status == 1 and len(result["problems"]) == 60 and result["from_journal"] is None


def test_a_verdict_says_what_it_has_from_the_journal(half_verified, monkeypatch, capsys):
    size = next(half_verified.glob("*.shard")).stat().st_size
    journal = Path(f"{half_verified}.verify-journal")
    kept = journal.read_bytes()
    checked: list[int] = []
    monkeypatch.setattr(Shard, "check_block", recorded(checked, Shard.check_block))
    (shard,) = LogitStore(half_verified)._shards

    status, out = command(monkeypatch, capsys, "verify", half_verified, "--workers", 1)
    taken = int(re.search(r"([0-9,]+) of its", out)[1].replace(",", ""))
    assert status == 0 and "intact" in out and f"{size:,} bytes were read by an interrupted" in out
    assert time.strftime("between %Y-%m-%d") in out and "--anew" in out
    # Runs of four blocks stand for equal parts of the file.
    share = 1 - len(checked) / shard.footer.blocks
    assert taken / size == pytest.approx(share, abs=5 / shard.footer.blocks)

    checked.clear()
    journal.write_bytes(kept)
    status, out = command(
        monkeypatch, capsys, "verify", half_verified, "--anew", "--json", "--workers", 1
    )
    assert json.loads(out)["from_journal"] is None and len(checked) == shard.footer.blocks
    assert not journal.exists()


def test_verify_where_no_journal_can_be_written(store, monkeypatch, capsys, tmp_path):
    """A folder of that name stands in for a read-only one, which root could write to."""
    Path(f"{store}.verify-journal").mkdir()
    monkeypatch.setattr(sys, "argv", ["megatron-pd", "verify", str(store)])
    assert main() == 0
    said = capsys.readouterr()
    assert "intact" in said.out and "cannot be written (Is a directory)" in said.err
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, capsys, "verify", store, "--journal", tmp_path)
    assert left.value.code == 2
    assert f"error: --journal {tmp_path} cannot be written" in capsys.readouterr().err
    # A disk that is full while the check goes on.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        words = ("verify", store, "--journal", tmp_path / "journal")
        assert command(monkeypatch, capsys, *words)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

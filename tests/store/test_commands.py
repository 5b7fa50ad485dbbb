"""The store's commands print what the rows say."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from megatron_pd.cli import main
from megatron_pd.store import LogitStoreWriter, TeacherRows


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


def test_inspect(store, monkeypatch, capsys):
    png = store.parent / "h.png"
    words = ("--document", 0, "--top", 1, "--plot", png)
    status, out = command(monkeypatch, capsys, "inspect", store, *words)
    lines = [line.split() for line in out.splitlines()[-4:-1]]
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

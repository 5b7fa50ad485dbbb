"""What the benchmarks share, and the store's benchmark on a few random rows."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import common

ROOT = Path(__file__).parents[2]


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    arguments = common.parser("A benchmark.", repeats=9, device="cpu")
    arguments.add_argument("--size", type=int, default=1000)
    return common.parse(arguments, dict(size=10, repeats=2))


def test_quick_gives_other_defaults_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    full = parsed(monkeypatch)
    assert (full.size, full.repeats, full.device) == (1000, 9, "cpu")
    quick = parsed(monkeypatch, "--quick", "--repeats", "5")
    assert (quick.size, quick.repeats) == (10, 5)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--repeats 0", "--repeats is 0: give 1 or more"),
        ("--device cuda", "torch sees no GPU: check nvidia-smi, or use --device cpu"),
    ],
)
def test_bad_options_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *words.split())
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_the_command_line_names_no_folder_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = ROOT / "tools/benchmarks/bench_loss.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output", "/some/where/two words.md"])
    expected = "python tools/benchmarks/bench_loss.py --output 'two words.md'"
    assert common.command_line() == expected


def test_contenders_take_turns_and_every_figure_is_summed_up() -> None:
    order = []
    times = iter([3.0, 10.0, 1.0, 40.0, 2.0, 20.0, 8.0, 30.0])

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"ms": next(times), "turn": len(order)}

    found = common.alternate({"a": lambda: run("a"), "b": lambda: run("b")}, repeats=4)
    assert order == ["a", "b"] * 4
    a, b = found["a"]["ms"], found["b"]["ms"]
    assert (a.min, a.median, a.mean, a.max) == (1.0, 2.5, 3.5, 8.0)
    assert b.values == (10.0, 40.0, 20.0, 30.0)
    assert common.spreads(found["a"]) == {"ms": [1.0, 2.5, 8.0], "turn": [1, 4.0, 7]}


def test_fastest_is_that_of_the_repeats() -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    calls: list[int] = []
    assert common.fastest(lambda: calls.append(1), lambda: next(ticks), repeats=3) == 2.0
    assert len(calls) == 3


def test_clock_counts_milliseconds_of_what_it_is_given() -> None:
    assert common.Clock("cpu", lambda: 1.5)() == 1500.0
    before = time.perf_counter()
    now = common.Clock("cpu")()
    assert 1e3 * before <= now <= 1e3 * time.perf_counter()


def test_peak_memory_is_what_the_block_used() -> None:
    with common.peak_memory("cpu") as peak:
        torch.ones(50 * 2**20, dtype=torch.uint8)
    assert 45 * 2**20 < peak[0] < 100 * 2**20


def test_a_report_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = common.Report()
    for line in common.markdown_table(["name", "ms"], [["ours", "1.5"], ["theirs", "2"]]):
        report.line(line)
    options = argparse.Namespace(output=tmp_path / "r.md", json=tmp_path / "r.json")
    report.save(options, {"ours": 1.5})
    expected = "| name | ms |\n| --- | --- |\n| ours | 1.5 |\n| theirs | 2 |\n"
    assert capsys.readouterr().out == expected == options.output.read_text()
    assert json.loads(options.json.read_text()) == {"ours": 1.5}


def random_rows(
    rng: np.random.Generator, tokens: int, width: int, vocab_size: int, draws: int = 0
) -> dict[str, np.ndarray]:
    """As bench_store.py caches a teacher's rows; log(share of so many draws) if there are any."""
    lengths = np.array([tokens // 2, tokens - tokens // 2])
    counts = np.full(tokens, width, np.int32)
    counts[np.cumsum(lengths) - 1] = 0  # no token follows a document's last one
    ids = rng.permuted(np.tile(np.arange(vocab_size, dtype=np.int32), (tokens, 1)), axis=1)
    if draws:
        weights = np.tile(np.r_[draws - width + 1, np.ones(width - 1)], (tokens, 1))
        weights /= draws
    else:
        weights = -np.sort(-rng.dirichlet(np.full(width + 1, 0.5), tokens), axis=1)[:, :width]
        weights = np.maximum(weights, 1e-6)
    present = np.arange(width) < counts[:, None]
    return {
        "ids": np.where(present, ids[:, :width], -1),
        "logprobs": np.where(present, np.log(weights), 0).astype(np.float32),
        "counts": counts,
        "lengths": lengths,
    }


def test_the_stores_benchmark_on_random_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    top = random_rows(rng, 4500, width=50, vocab_size=300)
    sampled = random_rows(rng, 4500, width=50, vocab_size=300, draws=50)
    kinds = {"top": top, "sampled": sampled}
    arrays = {f"{kind}_{name}": rows[name] for kind, rows in kinds.items() for name in rows}
    np.savez(tmp_path / "ngram-300-100-1.npz", vocab_size=np.array(300), **arrays)
    words = "--vocab-sizes 300 --tokens 100 --repeats 1"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tools/benchmarks/bench_store.py", *words.split()),
            *("--cache", tmp_path, "--output", tmp_path / "r.md", "--json", tmp_path / "r.json"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "r.json").read_text())
    (size,) = figures["sizes"]
    assert size["rows"] == 4500 and size["entries/row"] == 50 * 4498 / 4500
    assert size["compact B/entry"] < size["Megatron B/entry"] < size["exact B/entry"]
    assert 0 < size["mean KL"] < size["max KL"] < 1e-2
    found = [row["B/entry"] for row in figures["value_bits"]]
    assert found == sorted(found) and len(found) == 6
    assert [row["kind"] for row in figures["speeds"]] == ["top", "sampled"]
    assert 0 <= figures["opening"]["bytes"] - 256 * (8 << 30) < 1000
    assert len(figures["coders"]) == 10

    text = (tmp_path / "r.md").read_text()
    assert text == done.stdout
    assert f"| **{size['compact B/entry']:.3f}** |" in text
    assert str(tmp_path) not in text

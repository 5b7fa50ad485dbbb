"""The benchmark of preprocess on a little text."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_figures_of_both_and_their_ratio(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    outcome = subprocess.run(
        [
            *(sys.executable, ROOT / "tools/benchmarks/bench_preprocess.py", "--repeats", "1"),
            *("--text-bytes", "200000", "--pieces", "400", "--training-bytes", "50000"),
            *("--json", figures),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(figures.read_text())
    ours, peer = found["preprocess"], found["encode_batch"]
    assert found["bytes"] >= 200_000
    assert found["ratio"] == {clock: peer[clock][0] / ours[clock][0] for clock in ("wall", "cpu")}
    assert f"{found['ratio']['wall']:.0%} of the rate of encode_batch" in outcome.stdout

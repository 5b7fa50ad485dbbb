"""tools/gpu_check.py, kept alive where there is no GPU: its stages, small, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_check(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools/gpu_check.py", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_every_stage_on_the_cpu(tmp_path: Path) -> None:
    done = run_check("--device", "cpu", "--small", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert {name: stage["outcome"] for name, stage in stages.items()} == {
        "build": "passed",
        "tests": "passed",
        "loss": "passed",
        "output layer": "passed",
        "gpt step": "passed",
        "training": "skipped",
        "memcheck": "skipped",
        "racecheck": "skipped",
    }
    shapes = {(shape["vocab_size"], shape["dtype"]): shape for shape in stages["loss"]["data"]}
    assert set(shapes) == {(v, dtype) for v in (1000, 1001) for dtype in ("bf16", "fp32")}
    for shape in shapes.values():
        measured = {(row["name"], row["k"]) for row in shape["contenders"]}
        assert measured == {
            (name, k)
            for name in ("megatron_pd", "Megatron", "Megatron, fused CE", "dense PyTorch")
            for k in (0, 5, 10)
        }
        losses = {row["loss"] for row in shape["contenders"] if row["k"] == 10}
        assert max(losses) == pytest.approx(min(losses), rel=1e-3)
        assert shape["copy_bytes_per_second"] > 0
    layer = {row["name"]: row for row in stages["output layer"]["data"]["contenders"]}
    assert layer["three products"]["over_three_products"] == 1 and "megatron_pd" in layer
    steps = {row["name"]: row for row in stages["gpt step"]["data"]["contenders"]}
    assert "LM only" in steps and "Megatron cached logits" in steps
    assert all(row["step_ms"] > 0 for row in steps.values())

    markdown = (tmp_path / "report.md").read_text()
    assert "not run on a GPU" in markdown
    for name in ("dense PyTorch", "Megatron cached logits", "copy bandwidth", "racecheck"):
        assert name in markdown


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = run_check("--output", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr and "--device cpu" in done.stderr


def test_it_starts_where_megatron_pd_is_not_installed() -> None:
    code = "import sys; sys.path.insert(0, 'tools'); import gpu_check; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "benchmarks" in loaded and not loaded & {"megatron_pd", "megatron"}

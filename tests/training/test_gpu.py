"""The same command on a GPU and on the CPU gives the same curves and the same rows.

MEGATRON_PD_TEST_DEVICE=cuda runs these; tools/gpu_check.py does. Everything that both start from,
the corpus, the first weights and the teacher's store, is made on the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import PD_STAR, World, curves, environment

from megatron_pd.store import LogitStore

pytestmark = pytest.mark.skipif(
    os.environ.get("MEGATRON_PD_TEST_DEVICE") != "cuda", reason="needs a GPU"
)

RUNS = {
    "lm only": [],
    "pd-star": PD_STAR,
    "chunks": [*PD_STAR, "--pd-loss-chunk-tokens", "16"],
    "student temperature": [*PD_STAR, "--pd-student-temperature", "2"],
    "robust": ["--pd-recipe", "robust"],
}
BF16 = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def on_gpu(module: str, argv: list[Any]) -> None:
    """Without torch.compile for Megatron's small functions, which would take most of the time."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        env=environment() | {"MEGATRON_PD_DEVICE": "cuda", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def gpu_curves(world: World, name: str, *flags: Any) -> dict[str, np.ndarray]:
    """Of the student's training on the GPU."""
    events = world.folder / f"gpu {name}"
    flags = (*world.from_student(), *flags, "--tensorboard-dir", events)
    on_gpu("megatron_pd.pretrain", world.training_flags(*flags))
    return curves(events)


@pytest.fixture(scope="module")
def training(world: World) -> Iterator[dict[str, Future]]:
    """All training runs on the GPU, side by side: name → its curves."""
    captured = ["--pd-capture", world.folder / "captured on a GPU"]
    runs = RUNS | {"bf16": [*PD_STAR, *BF16], "captured": captured}
    with ThreadPoolExecutor(len(runs)) as pool:
        yield {name: pool.submit(gpu_curves, world, name, *flags) for name, flags in runs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_curves(world: World, training: dict[str, Future], name: str) -> None:
    expected = world.train(*world.from_student(), *RUNS[name])
    found = training[name].result()
    for column in {"lm loss", "kd loss", "grad-norm"} & expected.keys():
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-3, err_msg=column)


def test_curves_in_bf16(world: World, training: dict[str, Future]) -> None:
    expected = world.train(*world.from_student(), *PD_STAR)
    found = training["bf16"].result()
    for column in ("lm loss", "kd loss"):
        np.testing.assert_allclose(found[column], expected[column], rtol=2e-2, err_msg=column)


def test_capture_leaves_the_losses_as_they_are(training: dict[str, Future]) -> None:
    captured, plain = training["captured"].result(), training["lm only"].result()
    np.testing.assert_array_equal(captured["lm loss"], plain["lm loss"])


def test_rows(world: World, teacher: Path) -> None:
    """Neighbours whose log-probs differ by rounding may change places: so the log-probs alone."""
    rows = {}
    for device in ("cpu", "cuda"):
        store = world.folder / f"rows-{device}.pd"
        flags = ["--dump-store", store, "--dump-codec", "exact", "--dump-statistics"]
        flags = world.dump_flags(teacher, *flags, "--dump-top-p", 1, "--dump-top-k", 20)
        if device == "cuda":
            on_gpu("megatron_pd.cli", ["dump", *flags])
        else:
            world.runner.check("megatron_pd.teacher.megatron", flags)
        rows[device] = LogitStore(store)
    for document in range(rows["cpu"].num_documents):
        found, expected = (rows[device].read(document) for device in ("cuda", "cpu"))
        np.testing.assert_array_equal(found.counts, expected.counts)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
        for name, values in expected.statistics.items():
            np.testing.assert_allclose(found.statistics[name], values, atol=1e-4, err_msg=name)

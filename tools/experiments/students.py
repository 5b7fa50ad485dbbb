"""What the experiments share: the demo's teacher and its stores, and students of one process."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # where `demo` is

from demo.report import Curves, read_scalars
from demo.runner import Runner, run_to_exit_status
from demo.stages import Demo, ModelSize, Stage

__all__ = [
    "DRAWS",
    "ROOT",
    "Curves",
    "Demo",
    "ModelSize",
    "Runner",
    "Stage",
    "read_scalars",
    "run_experiment",
    "sampled_store",
    "teacher_stages",
]

ROOT = Path("build/tails")
DRAWS = 50


def run_experiment(demo: Demo, run: Callable[[Runner], None]) -> int:
    """Call `run` with what runs stages in the demo's folder; returns the exit status."""
    runner = Runner(demo.folder, demo.settings)
    again = f"`{shlex.join(['python', *sys.argv])}` goes on at what is unfinished"
    return run_to_exit_status(lambda: run(runner), runner, again)


def teacher_stages(demo: Demo) -> list[Stage]:
    """The demo's teacher, the store of its top-0.95-50 rows, and one of random draws."""
    draws = demo.dump("--dump-sampled", str(DRAWS), "--dump-store", sampled_store(demo))
    return [*demo.teacher_stages(), Stage("dump random draws", draws)]


def sampled_store(demo: Demo) -> str:
    """Path of the store of random draws."""
    return demo.path("sampled.pd")

"""What the teacher's rows keep a training step waiting, with and without the fetching thread.

    make demo && .venv/bin/python tools/benchmarks/bench_rows.py --output docs/rows-benchmark.md

Repeats the demo's PD* run, shortened, and one of the size of its teacher, and reads what Megatron's
timer `teacher-rows` printed: 14 minutes on two cores. With and without take turns; figures are
means over the iterations but the first and over the repeats, waits those of the slower rank.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from demo import PROCESSES, _step_and_wait
from gpu_check import table
from rich.progress import track

from megatron_pd.errors import reporting_errors

# The last of a flag counts, so that the demo's command takes these after its own.
SHORT = "--train-iters 100 --lr-wsd-decay-iters 20 --save-interval 100"
LARGER = (
    "--num-layers 4 --hidden-size 256 --train-iters 30 --log-interval 5 --lr-warmup-iters 2 "
    "--lr-wsd-decay-iters 4 --save-interval 30"
)
RUNS = [  # name, processes, data workers of each, flags
    ("the demo's student", PROCESSES, 0, SHORT),
    ("the demo's student", PROCESSES, 2, SHORT),
    ("4 layers, hidden size 256", PROCESSES, 0, LARGER),
    ("4 layers, hidden size 256", PROCESSES, 2, LARGER),
    ("the demo's student, half a batch", 1, 0, f"{SHORT} --global-batch-size 16"),
]


def train_without_the_thread() -> int:
    """What torchrun starts instead of `-m megatron_pd.pretrain`."""
    with reporting_errors():
        from megatron_pd import pretrain
        from megatron_pd.data import batch

        batch.prefetch = lambda iterator: None
        return pretrain.main()


def measure(
    command: list[str], processes: int, workers: int, flags: str, thread: bool
) -> tuple[float, float]:
    """Milliseconds of a step, and of its wait for rows."""
    words = [word.replace(f"={PROCESSES}", f"={processes}") for word in command]
    if not thread:
        module = words.index("megatron_pd.pretrain")
        words[module - 1 : module + 1] = [__file__]
    with tempfile.TemporaryDirectory() as folder:
        outcome = subprocess.run(
            [
                *(*words, *flags.split(), "--num-workers", str(workers)),
                *("--save", folder, "--tensorboard-dir", folder),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if outcome.returncode:
        sys.exit(outcome.stdout[-4000:])
    return _step_and_wait(outcome.stdout)


def report(command: list[str], repeats: int) -> Iterator[str]:
    found: dict[tuple[int, bool], list[tuple[float, float]]] = defaultdict(list)
    turns = list(itertools.product(range(repeats), range(len(RUNS)), (True, False)))
    for _, run, thread in track(turns, "training"):
        found[run, thread].append(measure(command, *RUNS[run][1:], thread))

    def cells(run: int, thread: bool) -> list[str]:
        step, wait = np.mean(found[run, thread], axis=0)
        return [f"{step:.0f}", f"{wait:.2f}", f"{wait / step:.2%}"]

    yield "# Waiting for the teacher's rows"
    yield ""
    yield f"    python {shlex.join(sys.argv)}"
    yield ""
    yield (
        "What was run and how: the script's docstring. 32 sequences of 128 tokens a step, ms of a "
        f"step and of it waiting (`teacher-rows`), means of {repeats} runs on {os.cpu_count()} "
        "cores."
    )
    yield ""
    head = ["step", "waiting", "share"]
    yield from table(
        ["run", "processes", "workers", *head, *(f"{word}, no thread" for word in head)],
        (
            [name, str(processes), str(workers), *cells(run, True), *cells(run, False)]
            for run, (name, processes, workers, _) in enumerate(RUNS)
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--log",
        type=Path,
        default="build/demo/seed-1/logs/train-the-student-pd.log",
        help="of a demo's PD* run; its first line is the command",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the report here too")
    arguments = parser.parse_args()
    if not arguments.log.exists():
        parser.error(f"{arguments.log} is missing: run `make demo` first, or name another --log")
    command = arguments.log.read_text().partition("\n")[0].split()
    text = "\n".join(report(command, arguments.repeats)) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(train_without_the_thread() if "LOCAL_RANK" in os.environ else main())

"""Time that a training step waits for teacher logits, with and without the prefetching thread.

    make demo && .venv/bin/python tools/benchmarks/bench_rows.py --output docs/rows-benchmark.md
    python tools/benchmarks/bench_rows.py --quick     # its own small teacher and student, no demo

Repeats the demo's PD* run, shortened, and one of a larger student, and reads what Megatron's
timer `teacher-rows` printed: 14 minutes on two cores. Runs with and without the thread take turns;
figures are means over the iterations but the first interval and over the repeats, waits those of
the slower rank.
"""

import argparse
import functools
import itertools
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Report, Spread, alternate, command_line, markdown_table, parse, parser, spreads

from megatron_pd.errors import reporting_errors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # where `demo` is
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

from demo.report import step_and_wait
from demo.runner import Runner, run_to_exit_status
from demo.stages import ModelSize, Stage
from small_teacher import SmallTeacher


@dataclass(frozen=True)
class Training:
    """A run of the demo's command with other flags; of a flag that comes twice the last counts."""

    name: str
    processes: int
    workers: int
    """Data workers of each process."""

    flags: str


SHORT = "--train-iters 100 --lr-wsd-decay-iters 20 --save-interval 100"
LARGER = (
    "--num-layers 4 --hidden-size 256 --train-iters 30 --log-interval 5 --lr-warmup-iters 2 "
    "--lr-wsd-decay-iters 4 --save-interval 30"
)
TRAININGS = [
    Training("the demo's student", 2, 0, SHORT),
    Training("the demo's student", 2, 2, SHORT),
    Training("4 layers, hidden size 256", 2, 0, LARGER),
    Training("4 layers, hidden size 256", 2, 2, LARGER),
    Training("the demo's student, half a batch", 1, 0, f"{SHORT} --global-batch-size 2"),
]
QUICK_TRAININGS = [Training("a small student", 2, 0, "")]
FOLDER = Path("build/bench-rows")
QUICK_DEMO = SmallTeacher(
    root=FOLDER,
    teacher=ModelSize(layers=1, hidden=64, iterations=30, lr=3e-3, decay_iterations=10),
    student=ModelSize(layers=2, hidden=128, iterations=50, lr=3e-3, decay_iterations=10),
    vocab_size=512,
    text_bytes=2_000_000,
    held_out_bytes=10_000,
)


def main() -> int:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument(
        "--log",
        type=Path,
        default="build/demo/seed-1/logs/train-the-student-pd.log",
        help="of a demo's PD* run; its first line is the command",
    )
    options = parse(arguments, dict(repeats=1))
    if options.quick:
        runner = Runner(QUICK_DEMO.folder, QUICK_DEMO.settings)
    elif options.log.exists():
        runner = Runner(FOLDER / "trainings", {})
    else:
        arguments.error(
            f"{options.log} is missing: run `make demo` first, name another --log, or use --quick"
        )

    def run() -> None:
        if options.quick:
            compare(runner, quick_command(runner), QUICK_TRAININGS, options)
        else:
            command = shlex.split(options.log.read_text().partition("\n")[0])
            compare(runner, command, TRAININGS, options)

    return run_to_exit_status(run, runner, f"`{command_line()}` trains all of them again")


def quick_command(runner: Runner) -> list[str]:
    """What trains the student of the quick demo, once that has its teacher's store."""
    runner.run(QUICK_DEMO.teacher_stages())
    pd = "--pd-recipe pd-star --timing-log-level 2".split()
    return QUICK_DEMO.training("student", QUICK_DEMO.student, *pd)


def compare(
    runner: Runner,
    command: Sequence[str],
    trainings: Sequence[Training],
    options: argparse.Namespace,
) -> None:
    """Run all trainings with and without the thread; print and write the report."""
    total = 2 * options.repeats * len(trainings)
    number = itertools.count(1)

    def run(training: Training, thread: bool) -> dict[str, float]:
        how = f"{training.processes} processes, {training.workers} workers"
        how += "" if thread else ", no thread"
        print(f"[{next(number)}/{total}] {training.name}, {how}", file=sys.stderr, flush=True)
        step, wait = measure(runner, command, training, thread)
        return {"step_ms": step, "waiting_ms": wait}

    found = alternate(
        {
            (training, thread): functools.partial(run, training, thread)
            for training in trainings
            for thread in (True, False)
        },
        options.repeats,
    )
    report = Report()
    for line in _lines(trainings, found, options.repeats):
        report.line(line)
    report.save(
        options,
        [
            dict(
                name=training.name,
                processes=training.processes,
                workers=training.workers,
                thread=thread,
                min_median_max=spreads(figures),
            )
            for (training, thread), figures in found.items()
        ],
    )


def measure(
    runner: Runner, command: Sequence[str], training: Training, thread: bool
) -> tuple[float, float]:
    """Milliseconds of a step, and of its wait for teacher logits."""
    processes = f"--nproc-per-node={training.processes}"
    words = [re.sub(r"^--nproc-per-node=\d+$", processes, word) for word in command]
    if not thread:
        module = words.index("megatron_pd.pretrain")
        words[module - 1 : module + 1] = [__file__]
    stage = f"training of {training.processes} with {training.workers}"
    with tempfile.TemporaryDirectory() as folder:
        words += [*training.flags.split(), "--num-workers", str(training.workers)]
        words += ["--save", folder, "--tensorboard-dir", folder]
        runner.run_stage(Stage(stage, words))
    return step_and_wait(runner.log_of(stage).read_text())


def train_without_the_thread() -> int:
    """What torchrun starts instead of `-m megatron_pd.pretrain`."""
    with reporting_errors():
        from megatron_pd import pretrain
        from megatron_pd.data import batch

        batch.prefetch = lambda iterator: None
        return pretrain.main()


def _lines(
    trainings: Sequence[Training],
    found: dict[tuple[Training, bool], dict[str, Spread]],
    repeats: int,
) -> Iterator[str]:
    def cells(training: Training, thread: bool) -> list[str]:
        step, wait = (found[training, thread][name].mean for name in ("step_ms", "waiting_ms"))
        return [f"{step:.0f}", f"{wait:.2f}", f"{wait / step:.2%}"]

    yield "# Waiting for teacher logits"
    yield ""
    yield f"    {command_line()}"
    yield ""
    yield (
        "Method: see the docstring of `tools/benchmarks/bench_rows.py`. Columns: step time, and "
        "the part spent waiting for teacher logits (ms; Megatron's timer `teacher-rows`). A step "
        f"is of 32 sequences of 128 tokens; means of {repeats} runs on {os.cpu_count()} cores."
    )
    yield ""
    head = ["step", "waiting", "share"]
    yield from markdown_table(
        ["run", "processes", "workers", *head, *(f"{word}, no thread" for word in head)],
        (
            [
                training.name,
                str(training.processes),
                str(training.workers),
                *cells(training, True),
                *cells(training, False),
            ]
            for training in trainings
        ),
    )


if __name__ == "__main__":
    sys.exit(train_without_the_thread() if "LOCAL_RANK" in os.environ else main())

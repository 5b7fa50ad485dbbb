"""What `--pd-capture` adds to a training step of the teacher.

    python tools/benchmarks/bench_online_capture.py
    python tools/benchmarks/bench_online_capture.py --quick

The same training run with and without it, as a user starts it, in one process that has all threads
of the machine for both: random weights, random tokens, the default top-p 0.95 and top-k 50, so that
every row has 50 entries, more than those of a teacher that has learned. A run's figure is the mean
of what Megatron's log says of its iterations, the first ones left out; the runs take turns. What is
written beside the steps is in it; making the stores at the end is a figure of its own.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_documents import even, write_corpus
from common import (
    Report,
    alternate,
    command_line,
    describe_machine,
    markdown_table,
    parse,
    parser,
    spreads,
)

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3
STEP = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")


def main() -> int:
    arguments = parser(__doc__, repeats=5, device="cpu")
    for name, default, help in (
        ("layers", 4, ""),
        ("hidden-size", 256, ""),
        ("vocab-size", 2048, ""),
        ("seq-length", 128, ""),
        ("micro-batch-size", 16, ""),
        ("global-batch-size", 32, ""),
        ("iterations", 40, "of a run"),
    ):
        arguments.add_argument(f"--{name}", type=int, default=default, help=help or None)
    options = parse(arguments, dict(repeats=1, iterations=10))
    report = Report()
    report.line("# Online capture\n")
    report.line(f"    {command_line()}\n")
    machine = describe_machine(options.device)
    report.line(", ".join(f"{name} {value}" for name, value in machine.items() if name != "note"))
    report.line("Method: see the docstring of `tools/benchmarks/bench_online_capture.py`.\n")
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options, report)
    report.save(options, {"machine": machine, **figures})
    return 0


def measure(folder: Path, options: Any, report: Report) -> dict[str, Any]:
    tokens = options.iterations * options.global_batch_size * options.seq_length
    write_corpus(folder / "corpus", even(2 * tokens, 300), options.vocab_size)
    found = alternate(
        {
            "without": partial(trained, folder, options),
            "with": partial(trained, folder, options, "--pd-capture", folder / "captured"),
        },
        options.repeats,
    )
    report.line(
        f"{options.layers} layers, hidden size {options.hidden_size}, V = {options.vocab_size:,}, "
        f"{options.global_batch_size} x {options.seq_length} tokens a step; milliseconds a step.\n"
    )
    head = ["--pd-capture", "least", "median", "most"]
    rows = [
        [name, *(f"{x:.1f}" for x in (each["step"].min, each["step"].median, each["step"].max))]
        for name, each in found.items()
    ]
    for line in markdown_table(head, rows):
        report.line(line)
    least, median = (
        getattr(found["with"]["step"], which) / getattr(found["without"]["step"], which) - 1
        for which in ("min", "median")
    )
    after = found["with"]["after"].min - found["without"]["after"].min
    report.line(
        f"\nIt adds {least:.1%} to a step (of the medians: {median:.1%}), and "
        f"{1e6 * after / tokens:.1f} µs a token at the end of the run, for the stores."
    )
    return {"overhead": least, "runs": {name: spreads(each) for name, each in found.items()}}


def trained(folder: Path, options: Any, *flags: object) -> dict[str, float]:
    """Milliseconds of a step, and seconds from the last step to the end of the process."""
    shutil.rmtree(folder / "captured", ignore_errors=True)
    words = f"""
        --tokenizer-type NullTokenizer --vocab-size {options.vocab_size}
        --num-layers {options.layers} --hidden-size {options.hidden_size} --num-attention-heads 4
        --seq-length {options.seq_length} --max-position-embeddings {options.seq_length}
        --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
        --untie-embeddings-and-output-weights --micro-batch-size {options.micro_batch_size}
        --global-batch-size {options.global_batch_size} --train-iters {options.iterations}
        --lr 1e-4 --eval-iters 0 --split 100,0,0 --num-workers 0 --log-interval 1
        --no-create-attention-mask-in-dataloader
    """
    command = [sys.executable, "-u", "-m", "megatron_pd.pretrain", *words.split()]
    command += ["--data-path", folder / "corpus", *flags]
    steps: list[float] = []
    last = time.perf_counter()
    log = []
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if match := STEP.search(line):
                steps.append(float(match[1]))
                last = time.perf_counter()
    after = time.perf_counter() - last
    if process.returncode:
        sys.exit(f"error: {shlex.join(map(str, command))}\n{''.join(log)[-4000:]}")
    return {"step": float(np.mean(steps[WARM_UP:])), "after": after}


if __name__ == "__main__":
    sys.exit(main())

"""What short documents cost: the commands on as many tokens in documents of 3 and of 300.

    python tools/benchmarks/bench_documents.py
    python tools/benchmarks/bench_documents.py --quick

A corpus of random tokens, a teacher with random weights, and every command that goes through a
store or a corpus document by document, as a user runs it: in a process of its own, on one thread,
with one worker. "start" is the same command on a single document of 3 tokens: Python, torch and
Megatron are imported and the model is loaded. "work" is what a command takes beyond its start. The
runs take turns; times are the least of the repeats.
"""

import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    Report,
    alternate,
    command_line,
    describe_machine,
    markdown_table,
    parse,
    parser,
    processor,
    spreads,
)

from megatron_pd.data.index import bin_path, idx_path, pack_header

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 3, 300
VOCAB_SIZE = 2000
TOKENIZER = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}".split()
MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 512
    --max-position-embeddings 512 --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 0 --eval-iters 0
    --split 100,0,0 --num-workers 0 --no-create-attention-mask-in-dataloader --save-interval 1
""".split()


def main() -> int:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--tokens", type=int, default=120_000, help="of a corpus")
    options = parse(arguments, dict(repeats=1, tokens=60_000))
    report = Report()
    report.line("# What short documents cost\n")
    report.line(f"    {command_line()}\n")
    machine = describe_machine("cpu") | {"device": processor()}
    report.line(", ".join(f"{name} {value}" for name, value in machine.items() if name != "note"))
    report.line("Method: see the docstring of `tools/benchmarks/bench_documents.py`.\n")
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options, report)
    report.save(options, {"tokens": options.tokens, "machine": machine, **figures})
    return 0


def measure(folder: Path, options: Any, report: Report) -> dict[str, Any]:
    corpora = {"start": [SHORT], "long": even(options.tokens, LONG)}
    corpora["short"] = even(options.tokens, SHORT)
    for name, lengths in corpora.items():
        write_corpus(folder / name, lengths, VOCAB_SIZE)
    teacher = folder / "teacher"
    run(
        "megatron_pd.pretrain",
        *TOKENIZER,
        *MODEL,
        "--data-path",
        folder / "long",
        "--save",
        teacher,
    )
    report.line(
        f"{options.tokens:,} tokens in {len(corpora['short']):,} documents of {SHORT} and in "
        f"{len(corpora['long']):,} of {LONG}; seconds, least of {options.repeats}.\n"
    )
    head = ["", "start", f"of {LONG}", f"of {SHORT}", "ratio", "ratio of work", "of its CPU time"]
    rows, figures = [], {}
    for name, command in commands(teacher).items():
        found = alternate(
            {corpus: partial(timed, command, folder / corpus) for corpus in corpora},
            options.repeats,
        )
        figures[name] = {corpus: spreads(each) for corpus, each in found.items()}
        start, long, short = (found[corpus] for corpus in corpora)
        wall = [each["wall"].min for each in (start, long, short)]
        ratios = [
            (short[clock].min - start[clock].min) / (long[clock].min - start[clock].min)
            for clock in ("wall", "cpu")
        ]
        figures[name]["ratios"] = dict(zip(("work", "cpu"), ratios, strict=True))
        rows.append([name, *(f"{x:.2f}" for x in (*wall, wall[2] / wall[1], *ratios))])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    for line in markdown_table(head, rows):
        report.line(line)
    return figures


class Command(NamedTuple):
    """Words of `megatron-pd`, in which {} stands for the corpus's prefix."""

    words: str
    output: str = ""
    """What it writes, after the prefix; not there when it begins."""


def commands(teacher: Path) -> dict[str, Command]:
    """The later ones read what the earlier ones wrote."""
    model = f"{shlex.join(TOKENIZER)} --load {teacher} --data-path {{}}"
    one = "--workers 1"
    return {
        "dump": Command(f"dump {model}", ".pd"),
        "verify": Command(f"verify {{}}.pd --corpus {{}} {one}"),
        "recode": Command(f"recode {{}}.pd --output {{}}.recoded {one}", ".recoded"),
        "merge": Command(f"merge {{}}.pd --output {{}}.merged {one}", ".merged"),
        "stats": Command(f"stats {{}}.pd {one}"),
        "to-parquet": Command(
            f"convert to-parquet {{}}.pd --output {{}}.parquet {one}", ".parquet"
        ),
        "from-parquet": Command(
            f"convert from-parquet {{}}.parquet --corpus {{}} --output {{}}.back {one}", ".back"
        ),
        "evaluate": Command(f"evaluate {model}"),
    }


def timed(command: Command, prefix: Path) -> dict[str, float]:
    """Seconds of a command: the clock's, and those that its processes worked."""
    output = Path(f"{prefix}{command.output}")
    if command.output and output.exists():
        shutil.rmtree(output)
    begun, used = time.perf_counter(), cpu_seconds()
    run("megatron_pd.cli", *(word.replace("{}", str(prefix)) for word in command.words.split()))
    return {"wall": time.perf_counter() - begun, "cpu": cpu_seconds() - used}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(module: str, *words: object) -> None:
    environment = os.environ | {"MEGATRON_PD_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"error: {shlex.join(done.args)}\n{done.stdout[-4000:]}")


def even(tokens: int, length: int) -> list[int]:
    """Lengths of the documents, so many tokens in all."""
    return [length] * (tokens // length)


def write_corpus(prefix: Path, lengths: list[int], vocab_size: int) -> None:
    """Documents of these lengths, of random tokens."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    tokens = np.random.default_rng().integers(0, vocab_size, sum(lengths)).astype(dtype)
    Path(bin_path(str(prefix))).write_bytes(tokens.tobytes())
    ends = np.cumsum(lengths)
    with Path(idx_path(str(prefix))).open("wb") as file:
        file.write(pack_header(dtype, len(lengths)))
        file.write(np.array(lengths, "<i4").tobytes())
        file.write(((ends - lengths) * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


if __name__ == "__main__":
    sys.exit(main())

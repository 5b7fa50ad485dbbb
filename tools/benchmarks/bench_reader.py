"""How many times the teacher rows that eight H100s consume one machine reads from a store.

    python tools/benchmarks/bench_reader.py --output docs/reader-benchmark.md

A store of the paper's vocabulary, 151,552 ids, with rows of 37 entries on average, 50 at most, at
10 bits a value, whose log-probabilities fall as a power of the rank. One process a core, each with
a store of its own as data workers have, reads all windows of 4,096 tokens once, in random order,
into padded buffers: from the page cache, and after the kernel was asked to drop the shards from
it (posix_fadvise), each process anew. The clock is that of the slowest process.

What eight H100s consume: the tokens that the paper's 1.9B student trains on at 400 TFLOP/s a GPU,
by Megatron's count of FLOPs (`megatron-pd plan`).
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import command_line, markdown_table, parse, parser, processor

from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows

VOCAB_SIZE = 151_552
WINDOW = 4096
COLUMNS = 50
TRAINING_FLOPS_PER_TOKEN = 10.54e9  # megatron-pd plan, MODEL=1.9b
GPUS = 8
GPU_FLOPS = 400e12


def options() -> argparse.Namespace:
    arguments = parser(__doc__ or "", repeats=3)
    arguments.add_argument("--windows", type=int, default=1000, help="default: %(default)s")
    arguments.add_argument(
        "--folder", type=Path, help="for the store, on the disk that is measured"
    )
    return parse(arguments, quick={"windows": 40, "repeats": 1})


def main() -> int:
    chosen = options()
    processes = len(os.sched_getaffinity(0))
    consumed = GPUS * GPU_FLOPS / TRAINING_FLOPS_PER_TOKEN
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        path = Path(folder) / "rows.pd"
        write_store(path, chosen.windows)
        size = sum(file.stat().st_size for file in path.iterdir())
        rows, figures = [], {}
        for source in ("page cache", "disk"):
            rates = [
                read_rate(path, chosen.windows, processes, source == "disk")
                for _ in range(chosen.repeats)
            ]
            best, worst = max(rates), min(rates)
            figures[source] = rates
            rows.append(
                [
                    source,
                    f"{worst / 1e6:.2f} to {best / 1e6:.2f}",
                    f"{worst * size / (chosen.windows * WINDOW) / 1e6:,.0f}",
                    f"{worst / consumed:.1f}",
                    f"{worst / consumed / processes:.1f}",
                ]
            )
    head = ["from", "M rows/s", "MB/s", "× eight H100s", "a core"]
    text = "\n".join(
        [
            "# The reader beside eight H100s",
            "",
            f"    {command_line()}",
            "",
            f"{processor()}, {processes} cores. Method: see the docstring of "
            "`tools/benchmarks/bench_reader.py`.",
            f"Eight H100s that train the 1.9B student consume {consumed:,.0f} rows/s.",
            f"The store has {chosen.windows * WINDOW:,} rows in {size / 1e6:,.0f} MB. "
            "Factors are of the slowest repeat.",
            "",
            *markdown_table(head, rows),
        ]
    )
    print(text)
    if chosen.output:
        chosen.output.write_text(text + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps({"rows per second": figures, "consumed": consumed}))
    return 0


def write_store(path: Path, windows: int) -> None:
    """A document a window."""
    generator = np.random.default_rng(1)
    lengths = np.full(windows, WINDOW, np.int64)
    ranks = np.arange(1, COLUMNS + 1)
    with LogitStoreWriter(
        path, vocab_size=VOCAB_SIZE, document_lengths=lengths, metadata={}
    ) as writer:
        for document in range(windows):
            counts = generator.integers(24, COLUMNS + 1, WINDOW).astype(np.int32)
            counts[-1] = 0
            steepness = generator.uniform(0.5, 2.5, (WINDOW, 1))
            weights = ranks**-steepness
            logprobs = np.log(0.95 * weights / weights.sum(1, keepdims=True)).astype(np.float32)
            # Frequent ids are small, and no row has one twice: column j of j's own residue.
            ids = np.minimum(generator.zipf(1.2, (WINDOW, COLUMNS)), VOCAB_SIZE // COLUMNS - 1)
            ids = (ids * COLUMNS + generator.permutation(COLUMNS)).astype(np.int32)
            padding = np.arange(COLUMNS) >= counts[:, None]
            ids[padding], logprobs[padding] = -1, 0
            writer.append(document, 0, TeacherRows(ids, logprobs, counts))


def read_rate(path: Path, windows: int, processes: int, drop: bool) -> float:
    """Rows a second, of all processes together."""
    if drop:
        os.sync()
        for file in path.iterdir():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(2).permutation(windows)
    context = multiprocessing.get_context("fork")
    gate, times = context.Barrier(processes + 1), context.Queue()
    readers = [
        context.Process(target=read, args=(path, order[rank::processes], gate, times))
        for rank in range(processes)
    ]
    for reader in readers:
        reader.start()
    gate.wait()
    seconds = max(times.get() for _ in readers)
    for reader in readers:
        reader.join()
    return windows * WINDOW / seconds


def read(path: Path, documents: np.ndarray, gate, times) -> None:
    store = LogitStore(path)
    out = (
        np.empty((WINDOW, COLUMNS), np.int32),
        np.empty((WINDOW, COLUMNS), np.float32),
        np.empty(WINDOW, np.int32),
    )
    gate.wait()
    begin = time.perf_counter()
    for document in documents.tolist():
        store.gather(np.array([[document, 0, WINDOW]], np.int64), *out)
    times.put(time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())

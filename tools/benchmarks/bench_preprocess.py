"""`megatron-pd preprocess` beside the tokenizer that it calls, on the same cores.

    python tools/benchmarks/bench_preprocess.py
    taskset -c 0,1 python tools/benchmarks/bench_preprocess.py --quick

The text is that of installed packages' sources: a file is a document. `encode_batch` of
Hugging Face's `tokenizers` has it in memory, as strings, and one thread a core; what it gives is
dropped. `preprocess` has it on disk, as .jsonl.zst, and one worker a core, and leaves a corpus
there; that it has as many tokens is checked. Both run in processes of their own and take turns.
Wall-clock time is that of the calls, CPU time that of all their processes; neither has Python's
start.
"""

import json
import multiprocessing
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import zstandard
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
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
BATCH_DOCUMENTS = 1000


def main() -> int:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--text-bytes", type=int, default=64 << 20, help="of text to tokenize")
    arguments.add_argument("--tokenizer", help="folder; default: a BPE that is trained on the text")
    arguments.add_argument("--pieces", type=int, default=32_000, help="of that BPE")
    arguments.add_argument("--training-bytes", type=int, default=8 << 20, help="it learns from")
    options = parse(
        arguments, dict(repeats=3, text_bytes=8 << 20, pieces=8000, training_bytes=2 << 20)
    )
    workers = len(os.sched_getaffinity(0))
    report = Report()
    report.line(f"$ {command_line()}")
    machine = describe_machine("cpu") | {"device": f"{processor()}, {workers} cores are used"}
    report.line(", ".join(f"{name} {value}" for name, value in machine.items() if name != "note"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = list(documents(options.text_bytes))
        # Apart: its threads would be missing in what is forked later.
        tokenizer = options.tokenizer or apart(
            train, folder / "tokenizer", texts, options.pieces, options.training_bytes
        )
        path = folder / "text.jsonl.zst"
        with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}).encode() + b"\n")
        contenders: dict[str, Callable[[], Mapping[str, float]]] = {
            "encode_batch": lambda: apart(encode_batch, texts, tokenizer, workers),
            "preprocess": lambda: apart(preprocess, path, folder / "corpus", tokenizer, workers),
        }
        found = alternate(contenders, options.repeats)
    size = sum(len(text.encode()) for text in texts)
    tokens = [round(figures["tokens"].min) for figures in found.values()]
    if tokens[0] + len(texts) != tokens[1]:
        sys.exit(f"error: {len(texts)} documents, tokens {tokens}: not the same corpus")
    report.line(f"{size:,} bytes in {len(texts):,} documents, {tokens[0]:,} tokens")
    report.line()
    head = ["", *(f"{clock} s (min, median, max), MB/s" for clock in ("wall", "CPU"))]
    rows = [
        [name, *(cell(figures[clock].values, size) for clock in ("wall", "cpu"))]
        for name, figures in found.items()
    ]
    for line in markdown_table(head, rows):
        report.line(line)
    report.line()
    peer, ours = found["encode_batch"], found["preprocess"]
    ratios = {clock: peer[clock].min / ours[clock].min for clock in ("wall", "cpu")}
    report.line(
        f"preprocess has {ratios['wall']:.0%} of the rate of encode_batch ({ratios['cpu']:.0%} by "
        f"CPU time), best of {options.repeats} each."
    )
    figures = {name: spreads(each) for name, each in found.items()}
    report.save(options, {"bytes": size, "ratio": ratios, **figures, "machine": machine})
    return 0


def cell(values: tuple[float, ...], size: int) -> str:
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    return f"{low:.2f}, {middle:.2f}, {high:.2f}; {size / low / 1e6:.2f}"


# --- what is compared -----------------------------------------------------------------------------


def encode_batch(texts: list[str], tokenizer: str, threads: int) -> dict[str, float]:
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    backend.encode_batch(["warm up"] * threads)
    tokens = 0
    clock = Clocks()
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokens += sum(map(len, backend.encode_batch(texts[start : start + BATCH_DOCUMENTS])))
    return {**clock.seconds(), "tokens": tokens}


def preprocess(path: Path, prefix: Path, tokenizer: str, workers: int) -> dict[str, float]:
    from megatron_pd.megatron import cpu

    cpu.install()
    from megatron_pd.data.preprocess import preprocess
    from megatron_pd.data.tokenizer import tokenizer_config

    config = tokenizer_config("HuggingFaceTokenizer", tokenizer)
    clock = Clocks()
    summary = preprocess([str(path)], str(prefix), config, workers=workers)
    return {**clock.seconds(), "tokens": summary.tokens}


class Clocks:
    """Seconds since it was made: the clock's, and those that all cores worked."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def seconds(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "cpu": _cpu_seconds() - self._cpu}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def apart[Result](action: Callable[..., Result], *arguments: object) -> Result:
    """action(*arguments) in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=lambda: there.send(action(*arguments)))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        sys.exit(f"error: {action.__name__} failed")
    finally:
        process.join()


# --- text and tokenizer ---------------------------------------------------------------------------


def documents(num_bytes: int) -> Iterator[str]:
    """Sources of the standard library and of what is installed beside it, so many bytes of them."""
    paths = sysconfig.get_paths()
    for folder in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                yield text
            num_bytes -= len(text.encode())
            if num_bytes <= 0:
                return


def train(folder: Path, texts: list[str], pieces: int, num_bytes: int) -> str:
    every = max(1, sum(map(len, texts)) // num_bytes)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        track(texts[::every], "training a tokenizer"),
        pieces,
        special_tokens=[END],
        show_progress=False,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END)
    fast.save_pretrained(str(folder))
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())

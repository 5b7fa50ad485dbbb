"""The logit store in figures, beside Megatron's own cached logits and zstd, in one run.

    python tools/benchmarks/bench_store.py --cache teachers --output docs/store-benchmark.md
    python tools/benchmarks/bench_store.py --quick     # one small teacher

Teachers are interpolated 4-gram models of the standard library's sources (ngram_teacher.py) with
byte-level vocabularies of 8,000, 32,000 and 160,000 pieces; the rows are those of held-out
files. Making them takes about five minutes each; --cache keeps them for the next run.

Sizes are all bytes on disk. Megatron's shards are written by its own saver (top-p mask, 17-bit ids,
fp16 log-probs, torch.save, zstd, tar). Encoding and decoding are CPU time of the one thread that
works, decoding the best of the repeats, so that other work on the machine counts little; windows
and opening are wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zstandard
from common import (
    Report,
    alternate,
    command_line,
    fastest,
    markdown_table,
    parse,
    parser,
    processor,
)
from ngram_teacher import NgramTeacher, library_documents, train_tokenizer
from tqdm import tqdm

from megatron_pd.megatron import cpu
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows
from megatron_pd.store.format import Footer, Manifest, ShardHeader, shard_name
from megatron_pd.store.writer import BLOCK_ROWS

TOP_P, TOP_K, DRAWS = 0.95, 50, 50
WINDOW = 4096
MICRO_BATCHES = 16  # of WINDOW tokens, in one iteration of Megatron's


@dataclass
class Rows:
    """Rows of whole documents, one after another."""

    vocab_size: int
    lengths: np.ndarray
    rows: TeacherRows

    @property
    def entries(self) -> int:
        return int(self.rows.counts.sum())


# --- teachers ------------------------------------------------------------------------------------


def make_teacher(
    vocab_size: int, tokens: int, documents: int | None, adaptation: float, cache: Path | None
) -> tuple[Rows, Rows]:
    """About `tokens` top rows, and a third as many sampled ones."""
    name = f"ngram-{vocab_size}-{tokens}-{adaptation:g}{f'-{documents}' if documents else ''}.npz"
    file = None if cache is None else cache / name
    if file is None or not file.exists():
        arrays = _run_teacher(vocab_size, tokens, documents, adaptation)
        if file is None:
            return _rows_of(arrays, "top"), _rows_of(arrays, "sampled")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **arrays)
    arrays = dict(np.load(file))
    return _rows_of(arrays, "top"), _rows_of(arrays, "sampled")


def stored_rows(path: Path, tokens: int) -> Rows:
    """About `tokens` rows of an existing store of the kind `top`."""
    store = LogitStore(path)
    parts: list[TeacherRows] = []
    for document in range(store.num_documents):
        if sum(map(len, parts)) < tokens:
            found = store.read(document)
            rows = TeacherRows.empty(len(found), TOP_K)
            rows.ids[:, : found.ids.shape[1]] = found.ids[:, :TOP_K]
            rows.logprobs[:, : found.ids.shape[1]] = found.logprobs[:, :TOP_K]
            rows.counts[:] = np.minimum(found.counts, TOP_K)
            parts.append(rows)
    lengths = np.array([len(part) for part in parts])
    return Rows(store.vocab_size, lengths, TeacherRows.concatenate(parts))


def _rows_of(arrays: dict[str, np.ndarray], kind: str) -> Rows:
    rows = TeacherRows(*(arrays[f"{kind}_{name}"] for name in ("ids", "logprobs", "counts")))
    return Rows(int(arrays["vocab_size"]), arrays[f"{kind}_lengths"], rows)


def _run_teacher(
    vocab_size: int, tokens: int, documents: int | None, adaptation: float
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    texts = library_documents(documents)
    print(f"training a tokenizer of {vocab_size:,} pieces on {len(texts):,} files", flush=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    encoded = [np.array(e.ids, np.int64) for e in tokenizer.encode_batch(texts)]
    order = rng.permutation(len(encoded))
    held_out, seen = order[: len(order) // 10], order[len(order) // 10 :]
    vocab_size = tokenizer.get_vocab_size()
    training = [encoded[i] for i in seen if len(encoded[i]) > 4]
    teacher = NgramTeacher(training, vocab_size, adaptation)
    arrays: dict[str, np.ndarray] = {"vocab_size": np.array(vocab_size)}
    makers: dict[str, tuple[int, Callable[[np.ndarray], TeacherRows]]] = {
        "top": (tokens, lambda document: teacher.rows(document, TOP_P, TOP_K)),
        "sampled": (tokens // 3, lambda document: teacher.sampled_rows(document, DRAWS, rng)),
    }
    for kind, (wanted, rows_of) in makers.items():
        parts: list[TeacherRows] = []
        with tqdm(total=wanted, desc=f"{kind} rows", unit=" tokens") as bar:
            for i in held_out:
                if bar.n < wanted and len(encoded[i]) <= 20_000:
                    parts.append(rows_of(encoded[i]))
                    bar.update(len(parts[-1]))
        rows = TeacherRows.concatenate(parts)
        arrays |= {f"{kind}_{name}": getattr(rows, name) for name in ("ids", "logprobs", "counts")}
        arrays[f"{kind}_lengths"] = np.array([len(part) for part in parts])
    return arrays


# --- writing and reading -------------------------------------------------------------------------


def write_store(path: Path, data: Rows, **options) -> float:
    """Writes a store anew; CPU seconds."""
    shutil.rmtree(path, ignore_errors=True)
    ends = np.cumsum(data.lengths)
    begin = time.thread_time()
    with LogitStoreWriter(
        path, vocab_size=data.vocab_size, document_lengths=data.lengths, metadata={}, **options
    ) as writer:
        for document, end in enumerate(ends.tolist()):
            rows = data.rows[end - int(data.lengths[document]) : end]
            writer.append(document, 0, rows)
    return time.thread_time() - begin


def window_spans(lengths: np.ndarray, first: int, tokens: int) -> np.ndarray:
    """int64 [n, 3] spans of `tokens` consecutive rows of the corpus from row `first` on."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    document = int(np.searchsorted(starts, first, "right")) - 1
    spans, offset = [], first - int(starts[document])
    while tokens:
        length = min(tokens, int(lengths[document]) - offset)
        spans.append((document, offset, length))
        document, offset, tokens = document + 1, 0, tokens - length
    return np.array([span for span in spans if span[2]], np.int64)


def buffers(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (rows, width)
    return np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(rows, np.int32)


def decoded(store: LogitStore, data: Rows) -> TeacherRows:
    out = buffers(len(data.rows), data.rows.ids.shape[1])
    store.gather(window_spans(data.lengths, 0, len(data.rows)), *out)
    return TeacherRows(*out)


def decode_seconds(store: LogitStore, data: Rows, repeats: int) -> float:
    """CPU seconds to decode everything into padded buffers, window by window."""
    out = buffers(WINDOW, TOP_K)
    spans = [
        window_spans(data.lengths, first, WINDOW)
        for first in range(0, len(data.rows) - WINDOW + 1, WINDOW)
    ]

    def decode() -> None:
        for span in spans:
            store.gather(span, *out)

    best = fastest(decode, time.thread_time, repeats)
    return best * len(data.rows) / (len(spans) * WINDOW)


def window_milliseconds(
    store: LogitStore, data: Rows, repeats: int, windows: int = 200
) -> tuple[float, float]:
    """Warm random windows, each one's best of the repeats: median of wall-clock and of CPU time."""
    rng = np.random.default_rng()
    out = buffers(WINDOW, TOP_K)

    def run() -> dict[str, float]:
        wall, thread = time.perf_counter(), time.thread_time()
        store.gather(spans, *out)
        return {"wall": time.perf_counter() - wall, "thread": time.thread_time() - thread}

    best = []
    for first in rng.integers(0, len(data.rows) - WINDOW, windows).tolist():
        spans = window_spans(data.lengths, first, WINDOW)
        found = alternate({"window": run}, repeats)["window"]
        best.append((found["wall"].min, found["thread"].min))
    wall, thread = 1e3 * np.median(best, axis=0)
    return float(wall), float(thread)


def divergence(given: TeacherRows, found: TeacherRows) -> np.ndarray:
    """KL(given || found) of every row in nats; the mass of no entry is one more outcome."""
    kl = np.zeros(len(given))
    for begin in range(0, len(given), 1 << 14):
        part = slice(begin, begin + (1 << 14))
        entries = np.arange(given.ids.shape[1]) < given.counts[part, None]
        log_p = given.logprobs[part].astype(np.float64)
        log_q = found.logprobs[part].astype(np.float64)
        p, q = np.exp(log_p) * entries, np.exp(log_q) * entries
        tail_p, tail_q = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
        kl[part] = (p * (log_p - log_q)).sum(1) + tail_p * np.log(tail_p / tail_q)
    return kl[given.counts > 0]


def tempered_divergence(given: TeacherRows, found: TeacherRows, temperature: float) -> np.ndarray:
    """KL(given || found) of every row in nats, of its entries alone, renormalised at a temperature:
    what a loss on softmax(logits / temperature) over the kept entries sees."""
    kl = np.zeros(len(given))
    for begin in range(0, len(given), 1 << 14):
        part = slice(begin, begin + (1 << 14))
        entries = np.arange(given.ids.shape[1]) < given.counts[part, None]
        log_p, log_q = (
            np.where(entries, rows.logprobs[part] / temperature, -np.inf).astype(np.float64)
            for rows in (given, found)
        )
        log_p, log_q = (
            x - np.log(np.maximum(np.exp(x).sum(1, keepdims=True), 1e-30)) for x in (log_p, log_q)
        )
        difference = np.subtract(log_p, log_q, where=entries, out=np.zeros(entries.shape))
        kl[part] = (np.exp(log_p) * difference).sum(1)
    return kl[given.counts > 0]


# --- peers ---------------------------------------------------------------------------------------


def megatron_bytes(data: Rows, folder: Path) -> int:
    """Bytes of Megatron's own tar shards for the same rows.

    Its ids have 17 bits: of wider vocabularies it is given the low 17 bits, which it could not
    store as they are.
    """
    import torch

    cpu.install()  # before Megatron is imported
    from megatron.training.distillation import logits_saver

    saver = object.__new__(logits_saver.LogitsSaverHooks)
    saver.p, saver.min_k, saver._save_dtype = TOP_P, 1, torch.float16
    saver._topp_kept_counts, saver._pending_writes = [], {}
    sentinel = logits_saver.CACHED_LOGITS_LOGPROB_SENTINEL
    entries = np.arange(TOP_K) < data.rows.counts[:, None]
    logprobs = np.where(entries, data.rows.logprobs, sentinel)
    ids = np.where(entries, data.rows.ids, 0) % (1 << 17)
    starts = range(0, len(ids), WINDOW)
    for iteration, begin in enumerate(starts[::MICRO_BATCHES]):
        micro_batches = []
        for first in range(begin, min(begin + MICRO_BATCHES * WINDOW, len(ids)), WINDOW):
            part = slice(first, first + WINDOW)
            values, indices = saver._apply_topp_truncation(
                torch.from_numpy(logprobs[part])[:, None], torch.from_numpy(ids[part])[:, None]
            )
            packed = logits_saver.pack_indices(indices.long())
            micro_batches.append((values.to(saver._save_dtype).clone(), *packed))
        with mock.patch.object(logits_saver, "get_current_iteration", return_value=iteration):
            saver._buffer_iteration(*map(list, zip(*micro_batches, strict=True)))
    path = folder / "megatron.tar"
    saver._write_batched_tar(str(path), saver._pending_writes, b"{}")
    return path.stat().st_size


def zstd_attempts(data: Rows) -> list[tuple[str, float, float | None]]:
    """zstd on streams of rising preparation: (what was tried, bytes per entry, million entries
    compressed per second of CPU, the streams given)."""
    counts = data.rows.counts
    entries = np.arange(data.rows.ids.shape[1]) < counts[:, None]
    ids, logprobs = data.rows.ids[entries], data.rows.logprobs[entries]
    vocabulary_order = np.argsort(-np.bincount(ids, minlength=data.vocab_size), kind="stable")
    place_of_id = np.empty(data.vocab_size, np.int64)
    place_of_id[vocabulary_order] = np.arange(data.vocab_size)
    places, values = symbol_stream(place_of_id[ids], logprobs, counts)
    id_symbols, id_bits = symbols_of(places)
    value_symbols, value_bits = symbols_of(values)
    raw_bytes = (id_bits.sum() + value_bits.sum()) / 8
    ends = np.concatenate([[0], np.cumsum(counts)])
    whole = np.array([0, len(counts)])
    blocks = np.append(np.arange(0, len(counts), BLOCK_ROWS), len(counts))

    def total(streams: list[np.ndarray], level: int, cuts: np.ndarray) -> tuple[float, float]:
        compressor = zstandard.ZstdCompressor(level=level)
        parts = []
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            for stream in streams:
                part = stream[ends[first] : ends[last]]
                planes = part.view(np.uint8).reshape(len(part), -1).T
                parts.append(np.ascontiguousarray(planes).tobytes())
            parts.append(counts[first:last].astype(np.uint8).tobytes())
        begin = time.thread_time()
        size = sum(len(compressor.compress(part)) for part in parts)
        return size / len(ids), len(ids) / (time.thread_time() - begin) / 1e6

    plain = [ids.astype("<u4"), logprobs.astype("<f2")]
    prepared = [places.astype("<u4"), values.astype("<u2")]
    symbols = [id_symbols.astype(np.uint8), value_symbols.astype(np.uint8)]
    raw = raw_bytes / len(ids)
    entropy = (order_0_bits(id_symbols) + order_0_bits(value_symbols)) / 8 / len(ids) + raw
    streams = {
        "byte planes of ids and fp16 log-probs, one stream": (plain, whole, 0.0),
        "byte planes of vocabulary-order places and quantizer codes, one stream": (
            prepared,
            whole,
            0.0,
        ),
        "our symbols + raw bits, one stream": (symbols, whole, raw),
        f"our symbols + raw bits, blocks of {BLOCK_ROWS} rows": (symbols, blocks, raw),
    }
    tries: list[tuple[str, float, float | None]] = []
    for level in (3, 19):
        for name, (arrays, cuts, apart) in streams.items():
            size, speed = total(arrays, level, cuts)
            tries.append((f"zstd -{level}, {name}", size + apart, speed))
    return [*tries, ("order-0 entropy of our symbols + raw bits", entropy, None)]


def symbol_stream(
    places: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, bits: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers that `compact` codes for ids, given as places in the vocabulary order, and
    log-probabilities of all entries, but for the classes of rows (docs/store-format.md): int64
    [entries] each."""
    octaves = 23 - bits
    code = np.arange(75 * 2 ** (bits - 8) + 8 * octaves - 7)
    octave = np.minimum(code // 8, octaves)
    roots = (8 + code - 8 * octave) << octave
    codes = np.searchsorted(
        (roots[1:] + roots[:-1]) / 2, np.exp(0.5 * logprobs.astype(np.float64)) * roots[-1]
    )
    position = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    before = np.where(position == 0, len(roots) - 1, np.roll(codes, 1))
    tied = (position > 1) & (codes == before)
    places = places[np.lexsort((places, np.cumsum(~tied)))]
    return np.where(tied, places - np.roll(places, 1) - 1, places), before - codes


def symbols_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbol and count of raw bits of each number (docs/store-format.md)."""
    octave = np.log2(np.maximum(numbers, 1)).astype(np.int64)
    bits = np.maximum(octave - 3, 0)
    wide = 64 + ((octave - 6) << 3) + (numbers >> bits) - 8
    small = numbers < 64
    return np.where(small, numbers, wide), np.where(small, 0, bits)


def order_0_bits(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# --- a large store -------------------------------------------------------------------------------

_OPENING = """
import json, resource, sys, time
import numpy
from megatron_pd.store import LogitStore
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
begin = time.perf_counter()
store = LogitStore(sys.argv[1])
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resident(), resident() - before, store.nbytes]))
"""


def open_sparse_store(
    folder: Path, shards: int = 256, shard_bytes: int = 8 << 30
) -> dict[str, float]:
    """What a fresh process takes to open a store of sparse files: `seconds`, `resident_mib`,
    `store_mib`, the part of that for the store, and the store's `bytes`. Headers and footers are
    real, and opening reads no more."""
    documents = 1 << 18  # per shard
    lengths = np.full(documents, 1000)
    manifest = Manifest.of(150_000, np.tile(lengths, shards), 0, {"teacher": "synthetic"})
    path = folder / "sparse"
    path.mkdir()
    (path / "store.json").write_bytes(manifest.to_bytes())
    rows = int(lengths.sum())
    blocks = rows // BLOCK_ROWS + 1
    index_bytes = 8 * (documents + 1 + 2 * blocks)
    crc_bytes = 4 * -(-index_bytes // 4096)
    for shard in range(shards):
        first = shard * documents
        header = ShardHeader(
            manifest.store_id, first, documents, rows, 150_000, 0, 10, False
        ).to_bytes()
        footer = Footer(
            shard_bytes,
            shard_bytes - Footer.BYTES - crc_bytes - index_bytes,
            *(index_bytes, blocks, 20 * rows, TOP_K, 0),
            zlib.crc32(header),
        )
        with open(path / shard_name(range(first, first + documents)), "wb") as file:
            file.write(header)
            file.truncate(shard_bytes)
            file.seek(shard_bytes - Footer.BYTES)
            file.write(footer.to_bytes())
    names = ("seconds", "resident_mib", "store_mib", "bytes")

    def opened() -> dict[str, float]:
        words = subprocess.check_output([sys.executable, "-c", _OPENING, str(path)])
        return dict(zip(names, json.loads(words), strict=True))

    found = alternate({"open": opened}, repeats=3)["open"]
    shutil.rmtree(path)
    return {name: values.min for name, values in found.items()}


# --- report --------------------------------------------------------------------------------------

Record = Mapping[str, Any]
"""One line of a table, by the names of its columns; None is printed as a dash."""

SIZES = {  # column → format
    "teacher": "{}",
    "rows": "{:,}",
    "entries/row": "{:.1f}",
    "compact B/entry": "**{:.3f}**",
    "Megatron B/entry": "{:.3f}",
    "ratio": "{:.1%}",
    "exact B/entry": "{:.3f}",
    "mean KL": "{:.1e}",
    "max KL": "{:.1e}",
    "mean KL at τ = 2": "{:.1e}",
    "sampled B/token": "{:.2f}",
}
VALUE_BITS = {
    "value bits": "{}",
    "B/entry": "{:.3f}",
    "mean KL": "{:.1e}",
    "max KL": "{:.1e}",
    "mean KL at τ = 2": "{:.1e}",
}
SPEEDS = {
    "vocabulary": "{:,}",
    "kind": "{}",
    "encode M entries/s": "{:.1f}",
    "decode M entries/s": "{:.1f}",
    "window of 4,096: entries": "{:,.0f}",
    "ms": "{:.2f}",
    "ms of CPU": "{:.2f}",
}
CODERS = {"coder": "{}", "B/entry": "{:.3f}", "M entries/s compressed": "{:.1f}"}


def table(formats: Mapping[str, str], records: Iterable[Record]) -> Iterator[str]:
    def cell(value: Any, form: str) -> str:
        return "–" if value is None else form.format(value)

    return markdown_table(
        list(formats),
        ([cell(record[name], form) for name, form in formats.items()] for record in records),
    )


def sizes(
    teachers: list[tuple[Rows, Rows]], stored: list[tuple[str, Rows]], folder: Path
) -> Iterator[Record]:
    named: list[tuple[str, Rows, Rows | None]] = []
    named += [(f"4-gram, {top.vocab_size:,}", top, sampled) for top, sampled in teachers]
    named += [(f"{name}, {top.vocab_size:,}", top, None) for name, top in stored]
    for name, top, sampled in named:
        write_store(folder / "s", top)
        store = LogitStore(folder / "s")
        precision = precision_of(store, top)
        ours, theirs = store.nbytes, megatron_bytes(top, folder)
        write_store(folder / "s", top, codec="exact")
        exact = LogitStore(folder / "s").nbytes
        sampled_bytes = None
        if sampled is not None:
            write_store(folder / "s", sampled, kind="sampled", draws=DRAWS)
            sampled_bytes = LogitStore(folder / "s").nbytes / len(sampled.rows)
        yield {
            "teacher": name,
            "rows": len(top.rows),
            "entries/row": top.entries / len(top.rows),
            "compact B/entry": ours / top.entries,
            "Megatron B/entry": theirs / top.entries,
            "ratio": ours / theirs,
            "exact B/entry": exact / top.entries,
            **precision,
            "sampled B/token": sampled_bytes,
        }


def precision_of(store: LogitStore, data: Rows) -> Record:
    found = decoded(store, data)
    kl, tempered = divergence(data.rows, found), tempered_divergence(data.rows, found, 2)
    return {
        "mean KL": float(kl.mean()),
        "max KL": float(kl.max()),
        "mean KL at τ = 2": float(tempered.mean()),
    }


def speeds(teachers: list[tuple[Rows, Rows]], folder: Path, repeats: int) -> Iterator[Record]:
    for top, sampled in teachers:
        for kind, data, options in (
            ("top", top, {}),
            ("sampled", sampled, {"kind": "sampled", "draws": DRAWS}),
        ):
            encode = write_store(folder / "s", data, **options)
            store = LogitStore(folder / "s")
            decode = decode_seconds(store, data, repeats)
            wall, cpu_time = window_milliseconds(store, data, repeats)
            yield {
                "vocabulary": data.vocab_size,
                "kind": kind,
                "encode M entries/s": data.entries / encode / 1e6,
                "decode M entries/s": data.entries / decode / 1e6,
                "window of 4,096: entries": WINDOW * data.entries / len(data.rows),
                "ms": wall,
                "ms of CPU": cpu_time,
            }


def value_bits(top: Rows, folder: Path) -> Iterator[Record]:
    for bits in (8, 9, 10, 11, 12, 14):
        write_store(folder / "s", top, value_bits=bits)
        store = LogitStore(folder / "s")
        per_entry = store.nbytes / top.entries
        yield {"value bits": bits, "B/entry": per_entry, **precision_of(store, top)}


def coders(data: Rows, folder: Path) -> Iterator[Record]:
    seconds = write_store(folder / "s", data)
    compact = LogitStore(folder / "s").nbytes / data.entries
    ours = ("compact (rANS, a model per context), all of it", compact, data.entries / seconds / 1e6)
    for attempt in (*zstd_attempts(data), ours):
        yield dict(zip(CODERS, attempt, strict=True))


def measure(options: argparse.Namespace, report: Report, folder: Path) -> dict[str, Any]:
    """Print the report and return its figures."""
    teachers = [
        make_teacher(
            vocab_size, options.tokens, options.documents, options.adaptation, options.cache
        )
        for vocab_size in options.vocab_sizes
    ]
    stored = [(path.name, stored_rows(path, options.tokens)) for path in options.store]
    widest = teachers[-1][0]
    figures: dict[str, Any] = {}

    def show(name: str, formats: Mapping[str, str], records: Iterable[Record]) -> None:
        figures[name] = list(records)
        for line in ("", *table(formats, figures[name]), ""):
            report.line(line)

    report.line("# The logit store, measured\n")
    report.line(f"    {command_line()}\n")
    report.line(
        f"{platform.machine()}, {processor()}. Method: see the docstring of "
        "`tools/benchmarks/bench_store.py`."
    )
    report.line(f"Rows are top-{TOP_P}-{TOP_K}; sampled rows have {DRAWS} draws.\n")

    report.line("## Size and precision")
    show("sizes", SIZES, sizes(teachers, stored, folder))
    report.line(
        "KL is from the given to the decoded row in nats, the mass of no entry included; at "
        "temperature τ = 2 it is that of the entries alone, renormalised. "
        "Megatron's ids end at 131,072: of wider vocabularies it was given the low 17 bits.\n"
    )
    report.line(f"At {widest.vocab_size:,} pieces, by `--dump-value-bits`:")
    show("value_bits", VALUE_BITS, value_bits(widest, folder))

    report.line("## Speed")
    show("speeds", SPEEDS, speeds(teachers, folder, options.repeats))
    report.line(
        "Encode and decode are CPU time of one thread, through `LogitStoreWriter` and "
        "`LogitStore.gather` into padded buffers. A window is random and warm, its time the median "
        f"over windows of the best of {options.repeats}.\n"
    )
    opening = figures["opening"] = open_sparse_store(folder)
    report.line(
        f"Opening a store of {opening['bytes'] / 2**40:.2f} TiB (256 sparse shards) takes "
        f"{opening['seconds']:.3f} s; the process then has {opening['resident_mib']:.0f} MiB "
        f"resident, {opening['store_mib']:.1f} MiB of them for the store.\n"
    )

    report.line(f"## General entropy coders, at {widest.vocab_size:,} pieces")
    show("coders", CODERS, coders(widest, folder))
    report.line(
        "Places and symbols are those of one class of rows. zstd's entries leave out headers, "
        "index, vocabulary order and entropy models; compact's has all of them (of so few rows the "
        "last two are some percent of it, of a whole shard next to nothing)."
    )
    return figures


QUICK = dict(vocab_sizes=[2000], tokens=15_000, documents=400, repeats=3)


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--vocab-sizes", type=int, nargs="+", default=[8_000, 32_000, 160_000])
    arguments.add_argument("--tokens", type=int, default=100_000, help="top rows of each teacher")
    arguments.add_argument(
        "--documents", type=int, help="files that the teachers learn (default: all)"
    )
    arguments.add_argument(
        "--adaptation",
        type=float,
        default=1.0,
        help="how far rows follow their document; 0: rows recur bit for bit, as no model's do",
    )
    arguments.add_argument(
        "--store",
        type=Path,
        nargs="+",
        default=[],
        help="rows of these stores as well (exact ones)",
    )
    arguments.add_argument("--cache", type=Path, help="folder that keeps the teachers' rows")
    options = parse(arguments, QUICK)
    warnings.filterwarnings("ignore", module="megatron")
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, report, Path(folder))
    report.save(options, figures)


if __name__ == "__main__":
    main()

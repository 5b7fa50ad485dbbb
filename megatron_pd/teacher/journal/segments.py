"""A journal: a teacher's rows in the order of a run, in segments that are whole or not there.

    journal.json                      what the rows are, and of which corpora
    run-0000-from-00000000/           a start of the run, and the iteration that it went on from
        rank0-00000000/               a segment
            manifest.json, *.shard    its rows, as a logit store of one document
            spans.npy                 where they belong

A segment gets its name when all of it is durable. Of a run that goes on from an earlier iteration
than the one before it had reached, the iterations in between are run again: what the earlier one
wrote of them doesn't count.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.files import AppendFile, fsync_directory, publish_once, write_error
from megatron_pd.store.format import corpus_digests, lengths_digest

__all__ = [
    "SPAN",
    "Journal",
    "Segment",
    "fingerprint_of",
    "segment_name",
    "spans_of",
    "write_segment",
]

SPAN = ("corpus", "document", "offset", "length", "iteration", "row")
"""The columns of spans, int64 [spans, 6]: `length` tokens of a document, from `offset` on, were run
in `iteration`, and their rows are the segment's from `row` on."""

_DESCRIPTION = "journal.json"
_RUN = re.compile(r"run-(\d{4,})-from-(\d{8,})")
_SEGMENT = re.compile(r"[a-z]+\d*-\d{8,}")
_COMPARED_DOCUMENTS = 1 << 10


@dataclass(frozen=True)
class Segment:
    """Rows that one rank wrote at once.

    Attributes:
        last_iteration: of the rows that count; None: all do.
    """

    path: Path
    last_iteration: int | None

    @property
    def store(self) -> LogitStore:
        """Its rows, as document 0."""
        return _opened(self.path)

    @property
    def iterations(self) -> tuple[int, int] | None:
        """The first and the last of the rows that count; None where none does."""
        first, last = self.store.metadata["iterations"]
        last = last if self.last_iteration is None else min(last, self.last_iteration)
        return (first, last) if first <= last else None

    def check(self) -> None:
        """Raises StoreError unless the spans are those that were written."""
        data = self._spans.read_bytes() if self._spans.exists() else b""
        if _digest(data) != self.store.metadata.get("spans"):
            raise StoreError(
                f"{self._spans}: damaged, its bytes are not those that were written. Copy the "
                "segment again, or remove its folder: its tokens then have no teacher."
            )

    def spans_in(self, corpus: int, documents: range) -> np.ndarray:
        """The spans of these documents that count: int64 [spans, 6] as SPAN says, by document and
        offset."""
        # Mapped anew each time: a run has more segments than a process may map files.
        spans = np.load(self._spans, mmap_mode="r", allow_pickle=False)
        spans = spans[slice(*np.searchsorted(spans[:, 0], [corpus, corpus + 1]))]
        spans = spans[slice(*np.searchsorted(spans[:, 1], [documents.start, documents.stop]))]
        if self.last_iteration is None:
            return np.array(spans)
        return spans[spans[:, SPAN.index("iteration")] <= self.last_iteration]

    @property
    def _spans(self) -> Path:
        return self.path / "spans.npy"


@functools.lru_cache(maxsize=256)
def _opened(path: Path) -> LogitStore:
    return LogitStore(path)


class Journal:
    """The folder of a journal.

    Raises:
        StoreError: there is none, it is damaged, or it was begun with something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        description = path / _DESCRIPTION
        if not description.exists():
            raise StoreError(f"{path}: no journal of a teacher's rows here ({_DESCRIPTION} lacks).")
        try:
            self.description: Mapping[str, Any] = json.loads(description.read_bytes())
            self.corpora: list[str] = self.description["corpora"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{description}: damaged ({error}). Copy it again.") from error

    @classmethod
    def begin(cls, path: Path, description: Mapping[str, Any]) -> Journal:
        """The journal at `path`, which is made unless it is there with this description."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
        data = json.dumps(description, indent=1, sort_keys=True).encode()
        if not (path / _DESCRIPTION).exists():
            publish_once(path / _DESCRIPTION, data)
        journal = cls(path)
        now = json.loads(data)
        differ = [
            f"begun with {name} {journal.description.get(name)!r}, now {now.get(name)!r}"
            for name in sorted(journal.description.keys() | now.keys())
            if journal.description.get(name) != now.get(name)
        ]
        if differ:
            raise StoreError(
                f"{path}: these rows were {'; '.join(differ)}. Go on with what they were begun "
                "with, or write into another folder."
            )
        return journal

    def begin_run(self, iteration: int) -> Path:
        """A new folder for a start of the run after `iteration`."""
        return self._run(len(self._runs()), iteration)

    def only_run(self) -> Path:
        """The folder of a run whose starts all go on from the same state."""
        return self._run(0, 0)

    def _run(self, number: int, iteration: int) -> Path:
        path = self.path / f"run-{number:04d}-from-{iteration:08d}"
        try:
            path.mkdir(exist_ok=True)
            fsync_directory(self.path)
        except OSError as error:
            raise write_error(path, error) from error
        return path

    def segments(self) -> list[Segment]:
        """All that are whole, in the order of the runs; none whose rows are of no count."""
        found: list[Segment] = []
        runs = self._runs()
        for number, (path, start) in enumerate(runs):
            later = [first for _, first in runs[number + 1 :]]
            last = min(later) if later else None
            if last is None or last > start:
                found += [Segment(path / name, last) for name in _segments_in(path)]
        return found

    def _runs(self) -> list[tuple[Path, int]]:
        """(folder, iteration it went on from) by number."""
        found = []
        for entry in os.listdir(self.path):
            if match := _RUN.fullmatch(entry):
                found.append((int(match[1]), self.path / entry, int(match[2])))
        return [(path, iteration) for _, path, iteration in sorted(found)]


def segment_name(writer: str, number: int) -> str:
    """What the `number`-th segment of a writer (lower-case letters and a number) is called."""
    return f"{writer}-{number:08d}"


def write_segment(
    path: Path, parts: list[tuple[np.ndarray, int, TeacherRows]], description: Mapping[str, Any]
) -> None:
    """One segment; when this returns, no crash can lose it.

    Args:
        path: of the segment: `segment_name` in a run's folder.
        parts: (addresses int64 [n, 3] as `data.addresses`, iteration, the n rows) each, at least
            one. Rows without an address are left out.
        description: of the journal.
    Raises:
        StoreError: a row is no distribution, or what a disk refuses.
    """
    addressed = [addresses[:, 0] >= 0 for addresses, _, _ in parts]
    addresses = np.concatenate([part[0][own] for part, own in zip(parts, addressed, strict=True)])
    iterations = np.concatenate(
        [np.full(own.sum(), part[1]) for part, own in zip(parts, addressed, strict=True)]
    )
    rows = TeacherRows.concatenate(
        [part[2][own] for part, own in zip(parts, addressed, strict=True)]
    )
    numbers = [iteration for _, iteration, _ in parts]
    buffer = io.BytesIO()
    np.save(buffer, spans_of(addresses, iterations))
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        with LogitStoreWriter(
            scratch,
            vocab_size=description["vocab_size"],
            document_lengths=np.array([len(rows) + 1]),
            metadata={
                "spans": _digest(buffer.getvalue()),
                "iterations": [min(numbers), max(numbers)],
            },
            kind="sampled" if description["draws"] else "top",
            draws=description["draws"],
            codec=description["codec"],
            value_bits=description["value_bits"],
            statistics=description["row_statistics"],
        ) as writer:
            writer.append(0, 0, rows)
            writer.append(0, len(rows), TeacherRows.empty(1))
        file = AppendFile(scratch / "spans.npy")
        try:
            file.append(buffer.getvalue())
            file.sync()
        finally:
            file.close()
        _rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def spans_of(addresses: np.ndarray, iterations: np.ndarray) -> np.ndarray:
    """Rows' addresses, int64 [n, 3], and iterations, int64 [n] → spans as SPAN says."""
    n = len(addresses)
    if not n:
        return np.zeros((0, len(SPAN)), np.int64)
    follows = (np.diff(addresses, axis=0) == (0, 0, 1)).all(1) & (np.diff(iterations) == 0)
    first = np.flatnonzero(np.concatenate([[True], ~follows]))
    lengths = np.diff(np.append(first, n))
    spans = np.column_stack([addresses[first], lengths, iterations[first], first]).astype(np.int64)
    return spans[np.lexsort((spans[:, 2], spans[:, 1], spans[:, 0]))]


def fingerprint_of(corpus: MegatronCorpus) -> str:
    """Tells corpora apart by their document lengths and the tokens of some documents."""
    lengths = corpus.document_lengths
    count = min(len(lengths), _COMPARED_DOCUMENTS)
    sample = np.unique(np.linspace(0, max(0, len(lengths) - 1), count, dtype=np.int64))
    tokens = corpus_digests(corpus, sample).tobytes() if count else b""
    return _digest(lengths_digest(lengths).encode() + tokens)


def _segments_in(run: Path) -> Iterator[str]:
    for entry in sorted(os.listdir(run)):
        if _SEGMENT.fullmatch(entry):
            yield entry


def _rename(scratch: Path, path: Path) -> None:
    try:
        fsync_directory(scratch)
        os.rename(scratch, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

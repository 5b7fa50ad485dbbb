"""Writes one shard of a logit store; safe against being killed at any instant."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.blocks import CodedBlock, RaggedRows, encode_frame, tables_frame
from megatron_pd.store.files import AppendFile, fsync_directory, publish_once, write_error
from megatron_pd.store.format import (
    CODECS,
    COMPACT,
    MANIFEST_NAME,
    MAX_VOCAB_SIZE,
    PARTIAL_SUFFIX,
    TABLES_FRAME,
    Footer,
    FrameHeader,
    Manifest,
    ShardHeader,
    is_intact,
    page_crcs,
    parse_shard_name,
    shard_name,
    token_digest,
)
from megatron_pd.store.tables import TablesTrainer
from megatron_pd.store.types import STATISTICS, Corpus, StoreError, TeacherRows

__all__ = ["LogitStoreWriter"]

# A read decodes a block from its start, on average half a block more than it asks for, which counts
# for short sequences; half as many rows a block would cost almost 1% more bytes.
BLOCK_ROWS = 256
BUFFER_BYTES = 16 << 20
Kind = Literal["top", "sampled"]


@dataclass
class _Blocks:
    """What the index and the footer will say about the blocks written so far."""

    rows: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    entries: int = 0
    max_count: int = 0
    statistics: int = 0

    def add(self, header: FrameHeader, offset: int) -> None:
        self.rows.append(header.row)
        self.offsets.append(offset)
        self.entries += header.entries
        self.max_count = max(self.max_count, header.max_count)
        self.statistics |= header.statistics

    def table(self) -> np.ndarray:
        """uint64 [blocks, 2]: first row and offset of every block, by row."""
        table = np.stack([np.array(self.rows, "<u8"), np.array(self.offsets, "<u8")], axis=1)
        return table[np.argsort(table[:, 0])]


class LogitStoreWriter:
    """Writes the rows of a contiguous range of documents into the store directory `path`.

    Every rank of a dump opens its own writer with the same `vocab_size`, `document_lengths` (int64
    [D], of the whole corpus), `metadata` (JSON-able: teacher, tokenizer hash, top_p, ...) and its
    own `documents` (default: all); ranks need not talk to each other.

    Documents come in any order, the rows of a document in order and in pieces of any size.  The
    last row of a document has no next token and must be empty.  `flush()` makes everything appended
    durable; after a crash the next writer of the same shard goes on from `written(document)`.
    Leaving the `with` block finishes the shard; leaving it by an exception keeps what was flushed
    and whatever of the rest reached the file.  A writer whose write failed or was interrupted can
    only be left; the next one goes on.  It holds some 100 MB beside 32 bytes per document.

    codec       "compact" (default), or "exact" (float32 log-probabilities).
    value_bits  resolution of `compact`: 10 bits cost about 2e-6 nats per entry of a row, at most
                three times that; each further bit leaves a quarter of it and takes about a bit per
                entry.
    corpus      binds the shard to the corpus by a hash of every document's tokens.
    token_digests  uint64 [documents of the shard]: these hashes themselves, in place of the corpus
                (copies of a store have `LogitStore.token_digests`).
    kind        "top", or "sampled" with `draws` (draws of every non-empty row).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        document_lengths: np.ndarray,
        metadata: Mapping[str, Any],
        codec: str = "compact",
        value_bits: int = 10,
        corpus: Corpus | None = None,
        token_digests: np.ndarray | None = None,
        documents: range | None = None,
        kind: Kind = "top",
        draws: int = 0,
    ) -> None:
        lengths = np.asarray(document_lengths, np.int64)
        _check_arguments(path, vocab_size, lengths, codec, kind, draws, value_bits)
        self.path = Path(path)
        self.documents = _checked_range(documents, len(lengths))
        self._corpus = corpus
        self._bound = corpus is not None or token_digests is not None
        self._vocab_size = vocab_size
        self._value_bits = value_bits
        self._trainer = (
            TablesTrainer(vocab_size, draws, value_bits) if CODECS[codec] == COMPACT else None
        )
        self._manifest = Manifest.of(vocab_size, lengths, draws, metadata)
        shard_lengths = lengths[self.documents.start : self.documents.stop]
        self._starts = np.concatenate([[0], np.cumsum(shard_lengths)])
        self._next = np.zeros(len(shard_lengths), np.int64)
        self._durable = np.zeros(len(shard_lengths), np.int64)
        self._digests = np.zeros(len(shard_lengths), np.uint64)
        if token_digests is not None:
            self._digests[:] = token_digests
        self._file: AppendFile | None = None
        self._pending: dict[int, list[RaggedRows]] = {}
        self._pending_end: dict[int, int] = {}
        self._pending_bytes = 0
        self._failed = False
        self._blocks = _Blocks()
        self._tables_offsets: dict[bytes, int] = {}
        self._statistics: tuple[str, ...] | None = None
        self._open()

    def append(self, document: int, offset: int, rows: TeacherRows) -> None:
        """Adds rows `offset`, `offset + 1`, ... of a document."""
        index = self._checked_position(document, offset, len(rows))
        ragged = RaggedRows.of(
            rows, self._vocab_size, self._manifest.draws, f"{self.path}, document {document}"
        )
        if offset + len(rows) == self._length(index) and len(rows) and rows.counts[-1]:
            raise StoreError(
                f"document {document}: its last row has {rows.counts[-1]} entries, but no token "
                "follows the last one. Rows are probably shifted by one: row j holds the "
                "distribution of token j + 1."
            )
        self._check_statistics(document, rows)
        if offset == 0 and self._corpus is not None:
            self._digests[index] = self._token_digest(document)
        if len(rows):
            self._enqueue(int(self._starts[index]) + offset, ragged)
            self._next[index] += len(rows)
        if self._pending_bytes >= BUFFER_BYTES:
            self._write_pending()

    def append_block(self, row: int, block: CodedBlock) -> None:
        """Adds a block of another shard as it is coded; `row`, counted from the shard's first, is
        its first row and must be the next of its document. `value_bits` must be that shard's."""
        self._check_usable()
        first, last = self._documents_of(row, row + block.rows)
        if self._file is None or row - self._starts[first] != self._next[first]:
            raise StoreError(f"{self._final}: row {row} was appended out of turn.")
        tables_offset = 0
        with self._failing_for_good():
            if block.tables is not None:
                key = _tables_key(block.tables)
                if key not in self._tables_offsets:
                    self._tables_offsets[key] = self._file.append(tables_frame(block.tables))
                tables_offset = self._tables_offsets[key]
            digests = self._digests[self._begun_in(row, row + block.rows)]
            frame = block.frame(row, digests if self._bound else digests[:0], tables_offset)
            header = FrameHeader.from_bytes(frame[: FrameHeader.BYTES])
            assert header is not None
            self._blocks.add(header, self._file.append(frame))
        ends = np.minimum(row + block.rows, self._starts[first + 1 : last + 1])
        self._next[first:last] = ends - self._starts[first:last]

    def flush(self) -> None:
        """Returns once everything appended before is durable."""
        self._check_usable()
        if self._file is not None:
            self._write_pending()
            with self._failing_for_good():
                self._file.sync()
        self._durable[:] = self._next

    def written(self, document: int) -> int:
        """Rows of a document that are durable: a restarted dump goes on at this offset."""
        return int(self._durable[self._checked_document(document)])

    def close(self) -> None:
        """Finishes the shard: checks that no row is missing, then publishes it."""
        self._check_usable()
        if self._file is None:
            return
        try:
            self._write_pending()
            self._check_complete()
            self._write_index(self._file)
            self._file.publish(self._final)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leaves the shard unfinished; the next writer goes on after the last whole block."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> LogitStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _open(self) -> None:
        self._final = self.path / shard_name(self.documents)
        header = ShardHeader(
            self._manifest.store_id,
            self.documents.start,
            len(self.documents),
            int(self._starts[-1]),
            self._vocab_size,
            self._manifest.draws,
            self._value_bits,
            self._bound,
        )
        self._header = header.to_bytes()
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                fsync_directory(self.path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        _publish_manifest(self.path / MANIFEST_NAME, self._manifest)
        if self._final.exists():
            self._durable[:] = self._next[:] = np.diff(self._starts)
            return
        self._check_overlap()
        partial = self._final.with_name(self._final.name + PARTIAL_SUFFIX)
        self._file = AppendFile(partial)
        try:
            self._resume(self._file)
        except BaseException:
            self.abandon()
            raise

    def _resume(self, file: AppendFile) -> None:
        found = file.read(0, len(self._header))
        if file.end <= len(self._header) and found != self._header and not is_intact(found):
            # Nothing, or what a crash left of the header: no frame comes before it is durable.
            file.truncate(0)
            file.append(self._header)
            file.sync()
            return
        if found != self._header:
            raise StoreError(
                f"{file.path}: an unfinished shard of another dump (other teacher, corpus, codec "
                "or settings) is in the way. Finish it with its own settings, or delete it."
            )
        end = len(self._header)
        for header, payload, offset in _frames(file):
            end = offset + FrameHeader.BYTES + len(payload)
            if header.type != TABLES_FRAME:
                self._remember(header, payload, offset)
            else:
                self._tables_offsets[_tables_key(payload)] = offset
                if self._trainer is not None:
                    self._trainer.resume(payload, offset)
        file.truncate(end)
        file.sync()  # a killed writer may have left what it wrote to the page cache alone
        self._durable[:] = self._next

    def _remember(self, header: FrameHeader, payload: bytes, offset: int) -> None:
        self._blocks.add(header, offset)
        if self._trainer is not None:
            self._trainer.resume_rows(header.entries)
        first, last = self._documents_of(header.row, header.row + header.rows)
        ends = np.minimum(header.row + header.rows, self._starts[first + 1 : last + 1])
        self._next[first:last] = ends - self._starts[first:last]
        if self._bound:
            begun = self._begun_in(header.row, header.row + header.rows)
            self._digests[begun] = np.frombuffer(payload, "<u8", len(begun))
        names = tuple(name for bit, name in enumerate(STATISTICS) if header.statistics >> bit & 1)
        self._statistics = names

    def _documents_of(self, row: int, end: int) -> tuple[int, int]:
        first = int(np.searchsorted(self._starts, row, "right")) - 1
        return first, int(np.searchsorted(self._starts, end, "left"))

    def _begun_in(self, row: int, end: int) -> np.ndarray:
        """Non-empty documents whose first row is in [row, end)."""
        first, last = np.searchsorted(self._starts[:-1], [row, end], "left")
        documents = np.arange(first, last)
        return documents[self._starts[documents] < self._starts[documents + 1]]

    def _enqueue(self, row: int, rows: RaggedRows) -> None:
        start = self._pending_end.pop(row, row)
        self._pending.setdefault(start, []).append(rows)
        self._pending_end[row + len(rows)] = start
        self._pending_bytes += 8 * len(rows.ids) + 16 * len(rows) + 1024

    def _write_pending(self) -> None:
        """Writes the buffered rows, neighbouring documents in common blocks."""
        with self._failing_for_good():
            runs = [(row, RaggedRows.concatenate(parts)) for row, parts in self._joined_runs()]
            if runs and self._trainer is not None:
                self._renew_tables(self._trainer, [rows for _, rows in runs])
            for row, rows in runs:
                for block in rows.blocks(BLOCK_ROWS):
                    self._write_block(row, block)
                    row += len(block)
        self._pending.clear()
        self._pending_end.clear()
        self._pending_bytes = 0

    def _joined_runs(self) -> Iterator[tuple[int, list[RaggedRows]]]:
        ends = {start: end for end, start in self._pending_end.items()}
        run: tuple[int, list[RaggedRows]] | None = None
        run_end = -1
        for start in sorted(self._pending):
            if run is not None and start == run_end:
                run[1].extend(self._pending[start])
            else:
                if run is not None:
                    yield run
                run = (start, list(self._pending[start]))
            run_end = ends[start]
        if run is not None:
            yield run

    def _renew_tables(self, trainer: TablesTrainer, runs: list[RaggedRows]) -> None:
        assert self._file is not None
        payload = trainer.train(runs)
        if payload is not None:
            trainer.resume(payload, self._file.append(tables_frame(payload)))

    def _write_block(self, row: int, rows: RaggedRows) -> None:
        assert self._file is not None
        digests = self._digests[self._begun_in(row, row + len(rows))]
        digests = digests if self._bound else digests[:0]
        tables = self._trainer.tables if self._trainer is not None else None
        frame = encode_frame(rows, row, digests, tables)
        offset = self._file.append(frame)
        header = FrameHeader.from_bytes(frame[: FrameHeader.BYTES])
        assert header is not None
        self._blocks.add(header, offset)

    def _write_index(self, file: AppendFile) -> None:
        table = self._blocks.table()
        parts = [self._starts.astype("<u8").tobytes()]
        if self._bound:
            parts.append(self._digests.astype("<u8").tobytes())
        index = b"".join([*parts, table.tobytes()])
        offset = file.append(index)
        file.append(page_crcs(index))
        footer = Footer(
            file.end + Footer.BYTES,
            offset,
            len(index),
            len(table),
            self._blocks.entries,
            self._blocks.max_count,
            self._blocks.statistics,
            zlib.crc32(self._header),
        )
        file.append(footer.to_bytes())

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """After an error or an interrupt inside, nobody knows which rows were written: only a new
        writer can tell, from the file."""
        try:
            yield
        except BaseException:
            self._failed = True
            self.abandon()
            raise

    def _check_usable(self) -> None:
        if self._failed:
            raise StoreError(
                f"{self._final}: an earlier write failed or was interrupted. Open the shard again: "
                "what was flushed is kept, and written(document) says where to go on."
            )

    def _check_complete(self) -> None:
        missing = np.flatnonzero(self._next < np.diff(self._starts))
        if len(missing):
            index = int(missing[0])
            raise StoreError(
                f"{self._final}: {len(missing)} of {len(self._next)} documents are not complete, "
                f"the first is document {self.documents[index]} with {self._next[index]} of "
                f"{self._length(index)} rows. Append the rest; what is there is kept."
            )

    def _check_overlap(self) -> None:
        for entry in self.path.iterdir():
            other = parse_shard_name(entry.name.removesuffix(PARTIAL_SUFFIX))
            if other and other != self.documents and _overlap(other, self.documents):
                raise StoreError(
                    f"{entry}: holds documents {other.start} to {other.stop - 1}, which overlap "
                    f"this writer's {self.documents.start} to {self.documents.stop - 1}. Give "
                    "every writer its own documents, and keep the split when a dump restarts."
                )

    def _check_statistics(self, document: int, rows: TeacherRows) -> None:
        names = tuple(name for name in STATISTICS if name in rows.statistics)
        if unknown := set(rows.statistics) - set(STATISTICS):
            raise StoreError(
                f"document {document}: unknown statistics {unknown}, known: {STATISTICS}."
            )
        if self._statistics is None:
            self._statistics = names
        if names != self._statistics:
            raise StoreError(
                f"document {document}: rows come with statistics {names}, earlier ones had "
                f"{self._statistics}. All rows of a shard have the same statistics."
            )

    def _checked_document(self, document: int) -> int:
        if document not in self.documents:
            raise StoreError(
                f"{self._final.name}: document {document} is not in this shard, which holds "
                f"{self.documents.start} to {self.documents.stop - 1}."
            )
        return document - self.documents.start

    def _checked_position(self, document: int, offset: int, rows: int) -> int:
        self._check_usable()
        index = self._checked_document(document)
        if self._file is None:
            raise StoreError(f"{self._final}: the shard is finished, nothing can be added to it.")
        if offset != self._next[index]:
            raise StoreError(
                f"document {document}: rows must come in order; the next one is "
                f"{self._next[index]}, but rows from {offset} were appended. "
                "Start at written(document)."
            )
        if offset + rows > self._length(index):
            raise StoreError(
                f"document {document}: rows {offset} to {offset + rows - 1} appended, but it has "
                f"{self._length(index)} tokens. Is this another corpus?"
            )
        return index

    def _length(self, index: int) -> int:
        return int(self._starts[index + 1] - self._starts[index])

    def _token_digest(self, document: int) -> int:
        assert self._corpus is not None
        tokens = self._corpus.tokens(document)
        expected = self._length(document - self.documents.start)
        if len(tokens) != expected:
            raise StoreError(
                f"document {document}: the corpus has {len(tokens)} tokens, document_lengths says "
                f"{expected}. Pass the lengths of this corpus."
            )
        return token_digest(tokens)


def _frames(file: AppendFile) -> Iterator[tuple[FrameHeader, bytes, int]]:
    """The whole frames at the start of an unfinished shard; ends at the first torn one."""
    offset = ShardHeader.BYTES
    while header := FrameHeader.from_bytes(file.read(offset, FrameHeader.BYTES)):
        payload = file.read(offset + FrameHeader.BYTES, header.payload_bytes)
        if len(payload) != header.payload_bytes or zlib.crc32(payload) != header.payload_crc:
            return
        yield header, payload, offset
        offset += FrameHeader.BYTES + header.payload_bytes


def _tables_key(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).digest()


def _publish_manifest(path: Path, manifest: Manifest) -> None:
    if not path.exists():
        publish_once(path, manifest.to_bytes())
    found = Manifest.from_bytes(path.read_bytes(), path)
    for name in ("vocab_size", "documents", "rows", "lengths_digest", "draws", "metadata"):
        there, here = getattr(found, name), getattr(manifest, name)
        if there != here and Manifest.to_bytes(found) != Manifest.to_bytes(manifest):
            raise StoreError(
                f"{path}: the store was begun with {name} {there!r}, this writer has {here!r}. "
                "Use the same settings on every rank and restart, or another path."
            )


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def _checked_range(documents: range | None, total: int) -> range:
    if documents is None:
        return range(total)
    if documents.step != 1 or not 0 <= documents.start <= documents.stop <= total:
        raise StoreError(f"documents={documents}: not a contiguous part of {total} documents.")
    return documents


def _check_arguments(
    path: str | Path,
    vocab_size: int,
    lengths: np.ndarray,
    codec: str,
    kind: str,
    draws: int,
    value_bits: int,
) -> None:
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise StoreError(f"{path}: vocab_size {vocab_size} is not in [1, {MAX_VOCAB_SIZE}].")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise StoreError(f"{path}: document_lengths must be a 1-D array of lengths >= 0.")
    if codec not in CODECS:
        raise StoreError(f"{path}: unknown codec {codec!r}; choose one of {sorted(CODECS)}.")
    lowest, highest = _logit_codec.MIN_VALUE_BITS, _logit_codec.MAX_VALUE_BITS
    if not lowest <= value_bits <= highest:
        raise StoreError(f"{path}: value_bits {value_bits} is not in [{lowest}, {highest}].")
    if not 0 <= draws < 1 << 16:
        raise StoreError(f"{path}: {draws} draws; a row of a store has at most 65,535.")
    if (kind == "sampled") != (draws > 0) or kind not in ("top", "sampled"):
        raise StoreError(
            f"{path}: kind {kind!r} with draws {draws}; 'sampled' needs draws > 0, 'top' draws 0."
        )

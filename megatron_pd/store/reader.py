"""Reads a logit store: random access by (document, offset), from several threads and processes."""

from __future__ import annotations

import itertools
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.store.blocks import RaggedRows, decode_exact
from megatron_pd.store.format import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Footer,
    FrameHeader,
    Manifest,
    ShardHeader,
    parse_shard_name,
    token_digest,
)
from megatron_pd.store.rows import Corpus, StoreError, TeacherRows

__all__ = ["LogitStore"]

_SAMPLED_DOCUMENTS = 256


class LogitStore:
    """The rows of a store directory.

    A store that lacks a shard, or has an unfinished or cut-off one, is refused with a StoreError;
    with `allow_partial` its missing rows read as empty.
    """

    def __init__(self, path: str | Path, *, allow_partial: bool = False) -> None:
        self.path = Path(path)
        self._allow_partial = allow_partial
        manifest_path = self.path / MANIFEST_NAME
        if not manifest_path.exists():
            raise StoreError(f"{self.path}: no logit store here ({MANIFEST_NAME} is missing).")
        self._manifest = Manifest.from_bytes(manifest_path.read_bytes(), manifest_path)
        self._shards = self._open_shards()
        self._firsts = [shard.documents.start for shard in self._shards]

    @property
    def vocab_size(self) -> int:
        return self._manifest.vocab_size

    @property
    def metadata(self) -> dict[str, Any]:
        """The free-form description given to the writer."""
        return dict(self._manifest.metadata)

    @property
    def draws(self) -> int:
        """Draws per row of a store of the `sampled` kind, else 0."""
        return self._manifest.draws

    @property
    def num_documents(self) -> int:
        return self._manifest.documents

    @property
    def num_rows(self) -> int:
        """Rows of all documents, the missing ones of a partial store included."""
        return self._manifest.rows

    @property
    def num_entries(self) -> int:
        return sum(shard.footer.entries for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: all shards and the manifest."""
        files = sum(shard.footer.file_bytes for shard in self._shards)
        return files + (self.path / MANIFEST_NAME).stat().st_size

    @property
    def max_count(self) -> int:
        """The most entries of any row."""
        return max((shard.footer.max_count for shard in self._shards), default=0)

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [D]; 0 for the documents that a partial store lacks."""
        lengths = np.zeros(self.num_documents, np.int64)
        for shard in self._shards:
            lengths[shard.documents.start : shard.documents.stop] = np.diff(shard.starts)
        return lengths

    def missing_documents(self) -> list[range]:
        """Ranges of documents that no finished shard holds."""
        missing, end = [], 0
        for shard in self._shards:
            if shard.documents.start > end:
                missing.append(range(end, shard.documents.start))
            end = max(end, shard.documents.stop)
        if end < self.num_documents:
            missing.append(range(end, self.num_documents))
        return missing

    def read(self, document: int, offset: int = 0, length: int | None = None) -> TeacherRows:
        """Rows [offset, offset + length) of a document (default: all)."""
        if length is None:
            shard = self._shard(document)
            length = (shard.length(document) if shard else 0) - offset
        parts = list(self._rows(document, offset, length))
        width = max((int(part.counts.max(initial=0)) for part in parts), default=0)
        if not parts:
            return TeacherRows.empty(length)
        return TeacherRows.concatenate([part.padded(width) for part in parts])

    def gather(
        self,
        spans: np.ndarray,
        out_ids: np.ndarray,
        out_logprobs: np.ndarray,
        out_counts: np.ndarray,
    ) -> None:
        """Reads spans (int64 [n, 3]: document, offset, length) one after another into out_ids
        int32 [rows, K], out_logprobs float32 [rows, K], out_counts int32 [rows].  Of a row with
        more than K entries the K likeliest are kept."""
        width, row = out_ids.shape[1], 0
        for document, offset, length in spans.tolist():
            rows = self.read(document, offset, length)
            kept, end = min(width, rows.ids.shape[1]), row + length
            out_ids[row:end, :kept], out_ids[row:end, kept:] = rows.ids[:, :kept], -1
            out_logprobs[row:end, :kept] = rows.logprobs[:, :kept]
            out_logprobs[row:end, kept:] = 0
            out_counts[row:end] = np.minimum(rows.counts, width)
            row = end

    def check_corpus(self, corpus: Corpus, *, full: bool = False) -> None:
        """Raises StoreError unless the store belongs to `corpus`: all document lengths and the
        tokens of a sample of documents (`full`: of all) are compared."""
        lengths = np.asarray(corpus.document_lengths, np.int64)
        if len(lengths) != self.num_documents:
            raise StoreError(
                f"{self.path}: made for a corpus of {self.num_documents} documents, this one has "
                f"{len(lengths)}. Use the corpus it was dumped from, or dump it for this one."
            )
        for shard in self._shards:
            shard.check_corpus(corpus, lengths, full)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._allow_partial)

    def _open_shards(self) -> list[_Shard]:
        shards: list[_Shard] = []
        for entry in sorted(os.listdir(self.path)):
            if (documents := parse_shard_name(entry)) is not None:
                shards.append(_Shard(self.path / entry, documents, self._manifest.store_id))
        for a, b in itertools.pairwise(shards):
            if a.documents.stop > b.documents.start:
                raise StoreError(f"{b.path}: overlaps {a.path.name}. Move one of them away.")
        self._shards = shards
        if not self._allow_partial and (missing := self.missing_documents()):
            raise StoreError(self._incomplete(missing))
        return shards

    def _incomplete(self, missing: list[range]) -> str:
        unfinished = sorted(self.path.glob("*" + PARTIAL_SUFFIX))
        names = ", ".join(path.name for path in unfinished[:3]) or "none"
        return (
            f"{self.path}: the store is not complete: {sum(map(len, missing))} of "
            f"{self.num_documents} documents are missing, first {missing[0].start} to "
            f"{missing[0].stop - 1} (unfinished shards: {names}). Run the dump again: it goes on "
            "where it stopped."
        )

    def _shard(self, document: int) -> _Shard | None:
        if not 0 <= document < self.num_documents:
            raise StoreError(
                f"{self.path}: document {document} asked for, it has {self.num_documents}."
            )
        index = bisect_right(self._firsts, document) - 1
        if index >= 0 and document in self._shards[index].documents:
            return self._shards[index]
        return None

    def _rows(self, document: int, offset: int, length: int) -> Iterator[RaggedRows]:
        shard = self._shard(document)
        if shard is not None:
            yield from shard.rows(document, offset, length)


def _reopen(path: Path, allow_partial: bool) -> LogitStore:
    return LogitStore(path, allow_partial=allow_partial)


class _Shard:
    """One finished shard file, mapped at its first use."""

    def __init__(self, path: Path, documents: range, store_id: int) -> None:
        self.path, self.documents = path, documents
        with open(path, "rb") as file:
            self.header = ShardHeader.from_bytes(file.read(ShardHeader.BYTES), path)
            size = os.fstat(file.fileno()).st_size
            self.footer = Footer.from_bytes(
                os.pread(file.fileno(), Footer.BYTES, max(0, size - Footer.BYTES)), path
            )
        if self.footer.file_bytes != size:
            raise StoreError(
                f"{path}: {size} bytes, its footer says {self.footer.file_bytes}. Copy it again."
            )
        if self.header.range != documents or self.header.store_id != store_id:
            raise StoreError(
                f"{path}: holds documents {self.header.range} of store "
                f"{self.header.store_id:016x}; its name and {MANIFEST_NAME} say {documents} of "
                f"{store_id:016x}. It was renamed or comes from another store: put it back."
            )
        self._map: mmap.mmap | None = None

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    @property
    def starts(self) -> np.ndarray:
        starts = np.frombuffer(self.map, "<u8", len(self.documents) + 1, self.footer.index_offset)
        return starts.astype(np.int64)

    @property
    def digests(self) -> np.ndarray | None:
        if not self.header.bound:
            return None
        offset = self.footer.index_offset + 8 * (len(self.documents) + 1)
        return np.frombuffer(self.map, "<u8", len(self.documents), offset)

    @property
    def blocks(self) -> np.ndarray:
        offset = self.footer.index_offset + 8 * (len(self.documents) * (1 + self.header.bound) + 1)
        return np.frombuffer(self.map, "<u8", 2 * self.footer.blocks, offset).reshape(-1, 2)

    def length(self, document: int) -> int:
        index = document - self.documents.start
        return int(self.starts[index + 1] - self.starts[index])

    def rows(self, document: int, offset: int, length: int) -> Iterator[RaggedRows]:
        if offset < 0 or length < 0 or offset + length > self.length(document):
            raise StoreError(
                f"{self.path}: rows {offset} to {offset + length - 1} of document {document} "
                f"asked for, it has {self.length(document)}. Is this another corpus?"
            )
        row = int(self.starts[document - self.documents.start]) + offset
        end = row + length
        block = int(np.searchsorted(self.blocks[:, 0], row, "right")) - 1
        while row < end:
            first, at = map(int, self.blocks[block])
            rows = self._decode(at)
            yield rows[row - first : min(len(rows), end - first)]
            row, block = first + len(rows), block + 1

    def _decode(self, at: int) -> RaggedRows:
        header = FrameHeader.from_bytes(self.map[at : at + FrameHeader.BYTES])
        if header is None:
            raise StoreError(f"{self.path}: damaged block header at byte {at}. Dump it again.")
        at += FrameHeader.BYTES
        payload = self.map[at : at + header.payload_bytes]
        if zlib.crc32(payload) != header.payload_crc:
            raise StoreError(f"{self.path}: damaged block at byte {at}. Dump it again.")
        digests = 0
        if self.header.bound:
            starts = self.starts
            begun = (starts[:-1] >= header.row) & (starts[:-1] < header.row + header.rows)
            digests = int((begun & (starts[:-1] < starts[1:])).sum())
        return decode_exact(header, payload, digests)

    def check_corpus(self, corpus: Corpus, lengths: np.ndarray, full: bool) -> None:
        there = lengths[self.documents.start : self.documents.stop]
        if len(differ := np.flatnonzero(np.diff(self.starts) != there)):
            raise self._other_corpus(int(differ[0]), "length")
        if self.digests is None:
            return
        count = len(self.documents) if full else min(len(self.documents), _SAMPLED_DOCUMENTS)
        for index in np.unique(np.linspace(0, len(self.documents) - 1, count, dtype=np.int64)):
            tokens = corpus.tokens(self.documents.start + int(index))
            if len(tokens) and token_digest(tokens) != self.digests[index]:
                raise self._other_corpus(int(index), "tokens")

    def _other_corpus(self, index: int, what: str) -> StoreError:
        return StoreError(
            f"{self.path}: document {self.documents.start + index} has other {what} in this corpus "
            "than in the one that the teacher read. Use that corpus, or dump the store again."
        )

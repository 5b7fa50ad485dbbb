"""One finished shard file: its index, and its blocks decoded, checked and cached."""

from __future__ import annotations

import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_pd.store.blocks import RaggedRows, decode_exact
from megatron_pd.store.format import (
    EXACT,
    MANIFEST_NAME,
    ROWS_FRAME,
    Footer,
    FrameHeader,
    ShardHeader,
    page_crcs,
    token_digest,
)
from megatron_pd.store.rows import Corpus, StoreError

__all__ = ["Shard"]

_SAMPLED_DOCUMENTS = 256
_CACHED_BLOCKS = 4


class Shard:
    """Opening reads the header and the footer; the index is mapped, checked and kept at its first
    use. Every fault of the file is a StoreError."""

    def __init__(self, path: Path, documents: range, store_id: int) -> None:
        self.path, self.documents = path, documents
        with open(path, "rb") as file:
            header = file.read(ShardHeader.BYTES)
            self.header = ShardHeader.from_bytes(header, path)
            size = os.fstat(file.fileno()).st_size
            self.footer = Footer.from_bytes(
                os.pread(file.fileno(), Footer.BYTES, max(0, size - Footer.BYTES)), path
            )
        self._check_identity(size, zlib.crc32(header), store_id)
        self._cache: OrderedDict[int, RaggedRows] = OrderedDict()

    def _check_identity(self, size: int, header_crc: int, store_id: int) -> None:
        if self.footer.file_bytes != size or self.footer.header_crc != header_crc:
            raise StoreError(
                f"{self.path}: {size} bytes, and its footer belongs to a file of "
                f"{self.footer.file_bytes} with another header or length. Copy it again."
            )
        if self.header.range != self.documents or self.header.store_id != store_id:
            raise StoreError(
                f"{self.path}: holds documents {self.header.range} of store "
                f"{self.header.store_id:016x}; its name and {MANIFEST_NAME} say {self.documents} "
                f"of {store_id:016x}. It was renamed or comes from another store: put it back."
            )

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _index(self) -> np.ndarray:
        """The index as int64 words, after its checksums and its order have been checked."""
        begin, size = self.footer.index_offset, self.footer.index_bytes
        words = len(self.documents) * (1 + self.header.bound) + 1 + 2 * self.footer.blocks
        data = self._map[begin : begin + size]
        crcs = self._map[begin + size : len(self._map) - Footer.BYTES]
        if size != 8 * words or len(data) != size or page_crcs(data) != crcs:
            raise StoreError(f"{self.path}: the shard's index is damaged. Dump this shard again.")
        return np.frombuffer(data, "<i8")

    @cached_property
    def starts(self) -> np.ndarray:
        """First row of every document, and the end of the last: int64 [documents + 1]."""
        return self._index[: len(self.documents) + 1]

    @cached_property
    def _digests(self) -> np.ndarray:
        begin = len(self.documents) + 1
        return self._index[begin : begin + len(self.documents)].view("<u8")

    @cached_property
    def _blocks(self) -> np.ndarray:
        """(first row, byte offset) of every block: int64 [blocks, 2]."""
        return self._index[len(self._index) - 2 * self.footer.blocks :].reshape(-1, 2)

    @cached_property
    def _begun(self) -> np.ndarray:
        """First rows of the documents that have any."""
        return self.starts[:-1][np.diff(self.starts) > 0]

    def length(self, document: int) -> int:
        index = document - self.documents.start
        return int(self.starts[index + 1] - self.starts[index])

    def rows(self, document: int, offset: int, length: int) -> Iterator[RaggedRows]:
        """The rows [offset, offset + length) of a document, block by block."""
        if offset < 0 or length < 0 or offset + length > self.length(document):
            raise StoreError(
                f"{self.path}: rows {offset} to {offset + length - 1} of document {document} "
                f"asked for, it has {self.length(document)}. Is this another corpus?"
            )
        row = int(self.starts[document - self.documents.start]) + offset
        end = row + length
        block = int(np.searchsorted(self._blocks[:, 0], row, "right")) - 1
        while row < end:
            first, rows = int(self._blocks[block, 0]), self._cached(block)
            yield rows[row - first : min(len(rows), end - first)]
            row, block = first + len(rows), block + 1

    def _cached(self, block: int) -> RaggedRows:
        """Neighbouring documents share blocks, and a long document is read in several spans."""
        rows = self._cache.get(block)
        if rows is None:
            rows = self._cache[block] = self.decode(block)
            while len(self._cache) > _CACHED_BLOCKS:
                try:
                    self._cache.popitem(last=False)
                except KeyError:  # another thread emptied it
                    break
        return rows

    def decode(self, block: int) -> RaggedRows:
        """The rows of a block, its checksums and values checked."""
        first, at = map(int, self._blocks[block])
        last = block + 1 == self.footer.blocks
        end = self.header.rows if last else int(self._blocks[block + 1, 0])
        header = FrameHeader.from_bytes(self._map[max(0, at) : max(0, at) + FrameHeader.BYTES])
        if header is None or header.row != first or first + header.rows != end:
            raise self._damaged(block, at)
        start = at + FrameHeader.BYTES
        payload = self._map[start : start + header.payload_bytes]
        if zlib.crc32(payload) != header.payload_crc:
            raise self._damaged(block, at)
        if header.type != ROWS_FRAME or header.codec != EXACT:
            raise StoreError(
                f"{self.path}: the block at byte {at} has codec {header.codec}, which this release "
                "cannot read. Install the release that wrote the store."
            )
        rows = decode_exact(header, payload, self._begun_in(first, end))
        if rows is None or not rows.in_range(self.header.vocab_size):
            raise self._damaged(block, at)
        return rows

    def _begun_in(self, first: int, end: int) -> int:
        """How many documents begin in these rows: each has its digest in the block."""
        if not self.header.bound:
            return 0
        begin, stop = np.searchsorted(self._begun, [first, end])
        return int(stop - begin)

    def _damaged(self, block: int, at: int) -> StoreError:
        return StoreError(f"{self.path}: block {block} at byte {at} is damaged. Dump it again.")

    def check_corpus(self, corpus: Corpus, lengths: np.ndarray, full: bool) -> None:
        """Raises StoreError unless the shard's documents are those of `corpus`; the tokens of a
        sample of them are compared, or (`full`) of all."""
        there = lengths[self.documents.start : self.documents.stop]
        if len(differ := np.flatnonzero(np.diff(self.starts) != there)):
            raise self._other_corpus(int(differ[0]), "length")
        if not self.header.bound:
            return
        count = len(self.documents) if full else min(len(self.documents), _SAMPLED_DOCUMENTS)
        for index in np.unique(np.linspace(0, len(self.documents) - 1, count, dtype=np.int64)):
            tokens = corpus.tokens(self.documents.start + int(index))
            if len(tokens) and token_digest(tokens) != self._digests[index]:
                raise self._other_corpus(int(index), "tokens")

    def _other_corpus(self, index: int, what: str) -> StoreError:
        return StoreError(
            f"{self.path}: document {self.documents.start + index} has other {what} in this corpus "
            "than in the one that the teacher read. Use that corpus, or dump the store again."
        )

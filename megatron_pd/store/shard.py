"""One finished shard file: opened, mapped, and read by the C++ codec."""

from __future__ import annotations

import contextlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_pd.errors import naming
from megatron_pd.store import _logit_codec
from megatron_pd.store.blocks import CodedBlock, EntropyModel
from megatron_pd.store.codecs import Codec
from megatron_pd.store.format import (
    MANIFEST_NAME,
    Footer,
    FrameHeader,
    ShardHeader,
    token_digest,
)
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import STATISTICS, Corpus, Layout, StoreError, TeacherRows

__all__ = ["Shard"]


class Shard:
    """Opening reads the header and the footer; the file is mapped at its first use, and every page
    of the index, block and entropy model is checked when it is touched. Faults are StoreErrors, as
    are a file that is cut short and a disk that fails while it is open. No descriptor stays open.

    Args:
        documents: those that the file's name promises.
        store_id: of the store's manifest.
        codecs: by the number in a block's header.
    """

    def __init__(
        self, path: Path, documents: range, store_id: int, codecs: Mapping[int, type[Codec]]
    ) -> None:
        self.path, self.documents, self._codecs = path, documents, codecs
        with open(path, "rb") as file:
            header = file.read(ShardHeader.BYTES)
            self.header = ShardHeader.from_bytes(header, path)
            size = os.fstat(file.fileno()).st_size
            self.footer = Footer.from_bytes(
                os.pread(file.fileno(), Footer.BYTES, max(0, size - Footer.BYTES)), path
            )
        self._check_identity(size, zlib.crc32(header), store_id)

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
    def native(self) -> _logit_codec.Shard:
        with naming(self.path), self._reported():
            return _logit_codec.Shard(
                os.fspath(self.path),
                rows=self.header.rows,
                documents=self.header.documents,
                blocks=self.footer.blocks,
                index_offset=self.footer.index_offset,
                index_bytes=self.footer.index_bytes,
                bound=self.header.bound,
                vocab_size=self.header.vocab_size,
                draws=self.header.draws,
                value_bits=self.header.value_bits,
                codecs={
                    number: (
                        np.dtype(codec.statistics_dtype).itemsize,
                        _decoder_of(codec, self.header.layout),
                    )
                    for number, codec in self._codecs.items()
                    if number not in _logit_codec.NATIVE_CODECS
                },
            )

    @property
    def first_codec(self) -> type[Codec] | None:
        """Of its first block; None without blocks."""
        return self._codec_of(self._header(0)) if self.footer.blocks else None

    @property
    def starts(self) -> np.ndarray:
        """First row of every document, and the end of the last: int64 [documents + 1]."""
        with self._reported():
            return self.native.starts().view(np.int64)

    def length(self, document: int) -> int:
        with self._reported():
            begin, end = self._document_rows(document)
        return end - begin

    def read(self, document: int, offset: int, length: int) -> TeacherRows:
        """The rows [offset, offset + length) of a document."""
        begin = self._checked_row(document, offset, length)
        return self._read_rows(begin, begin + length)

    def scan(self, documents: range, at_once: int) -> Iterator[tuple[int, int, TeacherRows]]:
        """As `LogitStore.scan`, of some of the shard's documents. It looks up no other's."""
        with self._reported():
            begin = self._document_rows(documents.start)[0]
            end = self._document_rows(documents.stop - 1)[1]
        for row in range(begin, end, at_once):
            with self._reported():
                at = bisect_right(documents, row, key=lambda d: self._document_rows(d)[0]) - 1
                document, offset = documents[at], row - self._document_rows(documents[at])[0]
            yield document, offset, self._read_rows(row, min(row + at_once, end))

    def _document_rows(self, document: int) -> tuple[int, int]:
        return self.native.document_rows(document - self.documents.start)

    def _read_rows(self, begin: int, end: int) -> TeacherRows:
        """The shard's rows [begin, end), whatever documents they are of."""
        with self._reported():
            width = self.native.max_count(begin, end)
        rows = TeacherRows.empty(end - begin, width)
        statistics = np.empty((len(STATISTICS), end - begin), np.float32)
        with self._reported():
            self.native.read(begin, end, rows.ids, rows.logprobs, rows.counts, 0, statistics)
        width = int(rows.counts.max(initial=0))
        present = {
            name: values
            for bit, (name, values) in enumerate(zip(STATISTICS, statistics, strict=True))
            if self.footer.statistics >> bit & 1
        }
        return TeacherRows(rows.ids[:, :width], rows.logprobs[:, :width], rows.counts, present)

    def read_into(
        self,
        document: int,
        offset: int,
        length: int,
        out: tuple[np.ndarray, np.ndarray, np.ndarray],
        first: int,
        statistics: np.ndarray | None = None,
    ) -> None:
        """Writes rows into the padded ids, logprobs and counts `out` from row `first` on, and all
        statistics into float32 [3, length] (NaN where absent)."""
        begin = self._checked_row(document, offset, length)
        with self._reported():
            self.native.read(begin, begin + length, *out, first, statistics)

    def _checked_row(self, document: int, offset: int, length: int) -> int:
        with self._reported():
            begin, end = self._document_rows(document)
        if offset < 0 or length < 0 or offset + length > end - begin:
            raise StoreError(
                f"{self.path}: rows {offset} to {offset + length - 1} of document {document} "
                f"asked for, it has {end - begin}. Is this another corpus?"
            )
        return begin + offset

    def token_digests(self, documents: range) -> np.ndarray:
        """uint64: a hash of the tokens of each document, in a bound shard."""
        first = self.documents.start
        with self._reported():
            return self.native.digests(documents.start - first, documents.stop - first)

    def coded_blocks(self, begin: int, end: int) -> Iterator[tuple[int, CodedBlock]]:
        """(first row, block) for the blocks of the shard's rows [begin, end), as they are coded; of
        blocks that are not wholly inside, the rows inside."""
        starts = self._block_starts
        models: dict[int, EntropyModel] = {}
        for index in range(int(np.searchsorted(starts, begin, "right")) - 1, len(starts)):
            row = int(starts[index])
            if row >= end:
                return
            self.check_block(index)
            header = self._header(index)
            codec, at = self._codec_of(header), header.model_offset
            with self._reported():
                payload = self.native.block_payload(index)
                if at and at not in models:
                    models[at] = EntropyModel(codec, self.native.block_model(index))
            block = CodedBlock(
                codec,
                header.statistics,
                header.rows,
                header.entries,
                header.max_count,
                payload[8 * header.digests :],
                models[at] if at else None,
            )
            first, stop = max(begin, row), min(end, row + header.rows)
            if stop - first < header.rows:
                counts = self._counts(row, row + header.rows)
                block = block.part(first - row, stop - row, counts, self.header.layout)
            if stop > first:
                yield first, block

    @cached_property
    def _block_starts(self) -> np.ndarray:
        """First row of every block: int64 [blocks]."""
        with self._reported():
            return self.native.block_rows().view(np.int64)

    def _header(self, block: int) -> FrameHeader:
        with self._reported():
            header = FrameHeader.from_bytes(self.native.block_header(block))
        assert header is not None
        return header

    def _codec_of(self, header: FrameHeader) -> type[Codec]:
        if header.codec not in self._codecs:
            raise StoreError(
                f"{self.path}: a block of codec number {header.codec}, which {MANIFEST_NAME} does "
                "not name. Copy the shard again from where it came from."
            )
        return self._codecs[header.codec]

    def _counts(self, begin: int, end: int) -> np.ndarray:
        width = max(1, self.footer.max_count)
        rows = TeacherRows.empty(end - begin, width)
        with self._reported():
            self.native.read(begin, end, rows.ids, rows.logprobs, rows.counts, 0)
        return rows.counts

    def check_index(self) -> None:
        """Raises StoreError unless the whole index is intact."""
        with self._reported():
            self.native.check_index()

    def check_frames(self) -> None:
        """Raises StoreError unless intact blocks and models fill the file up to its index."""
        with self._reported():
            self.native.check_frames()

    def check_block(self, block: int) -> None:
        """Raises StoreError unless a block is intact and decodes."""
        with self._reported():
            self.native.check_block(block)

    def check_masses(self, block: int) -> None:
        """Raises StoreError for a row that is no distribution, which writers once let pass."""
        header = self._header(block)
        if self._codec_of(header).normalises:
            return
        begin, layout = int(self._block_starts[block]), self.header.layout
        rows = self._read_rows(begin, begin + header.rows)

        def where(row: int) -> str:
            starts = self.starts
            index = int(np.searchsorted(starts, begin + row, "right")) - 1
            offset = begin + row - int(starts[index])
            return f"{self.path}: document {self.documents.start + index}, offset {offset}"

        RaggedRows.of(rows, layout.vocab_size, layout.draws, where)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except _logit_codec.CorruptError as error:
            raise StoreError(
                f"{self.path}: {error}. Copy the shard again from where it came from, or delete "
                "it and dump its documents again."
            ) from error.__cause__

    def check_corpus(
        self, corpus: Corpus, lengths: np.ndarray | None, full: bool, sample: int = 256
    ) -> None:
        """Raises StoreError unless the shard's documents are those of `corpus`: as long as in
        `lengths` (the corpus's int64 [D]; None: known to be), with the same tokens in `sample` of
        them, or (`full`) in all."""
        if lengths is not None:
            there = lengths[self.documents.start : self.documents.stop]
            if len(differ := np.flatnonzero(np.diff(self.starts) != there)):
                raise self._other_corpus(int(differ[0]), "length")
        if not self.header.bound or not len(self.documents):
            return
        count = len(self.documents) if full else min(len(self.documents), sample)
        digests = self.token_digests(self.documents)
        for index in np.unique(np.linspace(0, len(self.documents) - 1, count, dtype=np.int64)):
            tokens = corpus.tokens(self.documents.start + int(index))
            if len(tokens) and token_digest(tokens) != digests[index]:
                raise self._other_corpus(int(index), "tokens")

    def _other_corpus(self, index: int, what: str) -> StoreError:
        return StoreError(
            f"{self.path}: document {self.documents.start + index} has other {what} in this corpus "
            "than in the one that the teacher read. Use that corpus, or dump the store again."
        )


def _decoder_of(codec: type[Codec], layout: Layout) -> Callable[[int, bytes | None], Callable]:
    """What makes the decoder of the blocks that share a model, for the native reader."""

    def failed(offset: int, error: Exception) -> _logit_codec.CorruptError:
        return _logit_codec.CorruptError(
            f"the block at byte {offset}: codec {codec.name!r} can't decode it: "
            f"{type(error).__name__}: {error}"
        )

    def decoder(offset: int, model: bytes | None) -> Callable:
        try:
            coder = codec(layout, model)
        except Exception as error:
            raise failed(offset, error) from error

        def decode(
            offset: int, stream: bytes, rows: int, entries: int
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            try:
                found = coder.decode(stream, rows, entries)
                return (
                    np.ascontiguousarray(found.counts, np.int32),
                    np.ascontiguousarray(found.ids, np.int32),
                    np.ascontiguousarray(found.logprobs, np.float32),
                )
            except Exception as error:
                raise failed(offset, error) from error

        return decode

    return decoder

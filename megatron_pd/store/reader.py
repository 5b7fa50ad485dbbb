"""Reads a logit store: random access by (document, offset), from several threads and processes."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.store.blocks import CodedBlock
from megatron_pd.store.codecs import Codec
from megatron_pd.store.codecs.in_store import by_number
from megatron_pd.store.format import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Manifest,
    lengths_digest,
    parse_shard_name,
)
from megatron_pd.store.shard import Shard
from megatron_pd.store.types import STATISTICS, Corpus, StoreError, TeacherRows, statistics_in

__all__ = ["LogitStore"]

_SAMPLED_DOCUMENTS = 1 << 14


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
        self.manifest = Manifest.from_bytes(manifest_path.read_bytes(), manifest_path)
        self._codecs = by_number(self.manifest.codecs, manifest_path)
        self._shards = self._open_shards()
        self._firsts = [shard.documents.start for shard in self._shards]

    @property
    def store_id(self) -> int:
        """Hash of the manifest, which every shard carries."""
        return self.manifest.store_id

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def metadata(self) -> dict[str, Any]:
        """The free-form description given to the writer."""
        return dict(self.manifest.metadata)

    @property
    def draws(self) -> int:
        """Draws per row of a store of the `sampled` kind, else 0."""
        return self.manifest.draws

    @property
    def statistics(self) -> tuple[str, ...]:
        """The per-row statistics that its shards have, of `STATISTICS`."""
        return self.statistics_of(range(self.num_documents))

    def statistics_of(self, documents: range) -> tuple[str, ...]:
        """The statistics that the shards of these documents have; of no documents: any shards."""
        mask = 0
        for shard in self._shards:
            start = max(shard.documents.start, documents.start)
            if start < min(shard.documents.stop, documents.stop) or not documents:
                mask |= shard.footer.statistics
        return statistics_in(mask)

    def documents_without(self, statistic: str) -> list[range]:
        """The documents of the shards that have entries but not this statistic of them."""
        bit = STATISTICS.index(statistic)
        return [
            shard.documents
            for shard in self._shards
            if shard.footer.entries and not shard.footer.statistics >> bit & 1
        ]

    @property
    def is_bound(self) -> bool:
        """Whether every shard holds digests of its corpus's tokens."""
        return not self.unbound_documents()

    def unbound_documents(self) -> list[range]:
        """The documents of the shards without digests of their corpus's tokens."""
        return [shard.documents for shard in self._shards if not shard.header.bound]

    def uniform_documents(self) -> list[tuple[range, tuple[bool, int]]]:
        """The documents of each shard, with what all of them have in common and shards of one store
        may differ in: whether they have token digests, and which statistics (a bit for each)."""
        return [
            (shard.documents, (shard.header.bound, shard.footer.statistics))
            for shard in self._shards
        ]

    @property
    def codecs(self) -> set[str]:
        """Names of its blocks' codecs: one, unless it was put together from several stores."""
        return {codec.name for codec in self.codec_types}

    @property
    def codec_types(self) -> set[type[Codec]]:
        """The codecs themselves."""
        if self.manifest.codecs is not None:
            return {self._codecs[entry["number"]] for entry in self.manifest.codecs}
        # From before manifests said it; shards without blocks could have any.
        first = {shard.first_codec for shard in self._shards}
        return {codec for codec in first if codec is not None}

    @property
    def value_bits(self) -> set[int]:
        """The writer's `value_bits` of its shards."""
        return {shard.header.value_bits for shard in self._shards}

    @property
    def lengths_digest(self) -> str:
        """Tells corpora apart by their document lengths; the same for parts of one store."""
        return self.manifest.lengths_digest

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @property
    def shard_documents(self) -> list[range]:
        """The documents of each shard."""
        return [shard.documents for shard in self._shards]

    @property
    def num_rows(self) -> int:
        """Rows of all documents, the missing ones of a partial store included."""
        return self.manifest.rows

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

    def document_length(self, document: int) -> int:
        """Rows of one document; 0 where a partial store lacks it."""
        shard = self._shard(document)
        return 0 if shard is None else shard.length(document)

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
        shard = self._shard(document)
        if shard is None:
            return TeacherRows.empty(length or 0)
        if length is None:
            length = max(0, shard.length(document) - offset)
        return shard.read(document, offset, length)

    def scan(self, documents: range, at_once: int) -> Iterator[tuple[int, int, TeacherRows]]:
        """(document, offset, rows) of consecutive documents: at most `at_once` rows from there on,
        which go on over the documents' ends. Missing documents are left out."""
        index = max(0, bisect_right(self._firsts, documents.start) - 1)
        while index < len(self._shards) and self._firsts[index] < documents.stop:
            shard = self._shards[index]
            first = max(shard.documents.start, documents.start)
            stop = min(shard.documents.stop, documents.stop)
            if first < stop:
                yield from shard.scan(range(first, stop), at_once)
            index += 1

    def gather(
        self,
        spans: np.ndarray,
        out_ids: np.ndarray,
        out_logprobs: np.ndarray,
        out_counts: np.ndarray,
        out_statistics: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Reads spans (int64 [n, 3]: document, offset, length) one after another into out_ids
        int32 [rows, K], out_logprobs float32 [rows, K], out_counts int32 [rows] and, by name,
        out_statistics float32 [rows] each (NaN where the store has no such value); all contiguous.
        Of a row with more than K entries the top K are kept.  `rows` is the sum of the
        lengths."""
        statistics = out_statistics or {}
        out = (out_ids, out_logprobs, out_counts)
        self._check_outputs(spans, out, statistics)
        row = 0
        for document, offset, length in spans.tolist():
            shard, end = self._shard(document), row + length
            found = np.full((len(STATISTICS), length), np.nan, np.float32) if statistics else None
            if shard is None:
                out_ids[row:end], out_logprobs[row:end], out_counts[row:end] = -1, 0, 0
            else:
                shard.read_into(document, offset, length, out, row, found)
            for name, values in statistics.items():
                assert found is not None
                values[row:end] = found[STATISTICS.index(name)]
            row = end

    def _check_outputs(
        self,
        spans: np.ndarray,
        out: tuple[np.ndarray, np.ndarray, np.ndarray],
        statistics: Mapping[str, np.ndarray],
    ) -> None:
        if (rows := int(spans[:, 2].sum())) != len(out[2]):
            raise StoreError(
                f"{self.path}: the spans have {rows} rows, the buffers {len(out[2])}. "
                "Pass buffers of the spans' total length."
            )
        for array, dtype in zip(out, (np.int32, np.float32, np.int32), strict=True):
            if array.dtype != dtype or not array.flags.c_contiguous:
                raise StoreError(
                    f"{self.path}: a buffer of {array.dtype} (contiguous: "
                    f"{array.flags.c_contiguous}) given; pass contiguous int32 ids [rows, K], "
                    "float32 logprobs [rows, K] and int32 counts [rows]."
                )
        if unknown := sorted(statistics.keys() - set(STATISTICS)):
            raise StoreError(f"{self.path}: unknown row statistics {unknown}; known: {STATISTICS}.")

    def token_digests(self, documents: range) -> np.ndarray | None:
        """uint64, a hash of the tokens of each document (0: empty, or missing here); None where a
        shard of them is bound to no corpus."""
        digests = np.zeros(len(documents), np.uint64)
        for shard in self._shards:
            first = max(shard.documents.start, documents.start)
            stop = min(shard.documents.stop, documents.stop)
            if first >= stop:
                continue
            if not shard.header.bound:
                return None
            at = slice(first - documents.start, stop - documents.start)
            digests[at] = shard.token_digests(range(first, stop))
        return digests

    def coded_blocks(self, documents: range, skip: int = 0) -> Iterator[tuple[int, CodedBlock]]:
        """(row, block) for the rows of these documents but the first `skip`, for copying them as
        they are coded. Rows are counted from the first one of documents.start."""
        first = 0
        for shard in self._shards:
            start = max(shard.documents.start, documents.start)
            stop = min(shard.documents.stop, documents.stop)
            if start >= stop:
                continue
            begin = int(shard.starts[start - shard.documents.start])
            end = int(shard.starts[stop - shard.documents.start])
            if first + end - begin > skip:
                for row, block in shard.coded_blocks(begin + max(0, skip - first), end):
                    yield first + row - begin, block
            first += end - begin

    def check_corpus(self, corpus: Corpus, *, full: bool = False) -> None:
        """Raises StoreError unless the store belongs to `corpus`: all document lengths and the
        tokens of some documents of every shard, 16,384 in all (`full`: of all), are compared."""
        lengths = np.asarray(corpus.document_lengths, np.int64)
        if len(lengths) != self.num_documents:
            raise StoreError(
                f"{self.path}: made for a corpus of {self.num_documents} documents, this one has "
                f"{len(lengths)}. Use the corpus it was dumped from, or dump it for this one."
            )
        # The manifest's digest tells in one pass over the lengths, and reads nothing of the shards.
        same_lengths = lengths_digest(lengths) == self.manifest.lengths_digest
        sample = max(1, _SAMPLED_DOCUMENTS // max(1, len(self._shards)))
        for shard in self._shards:
            shard.check_corpus(corpus, None if same_lengths and not full else lengths, full, sample)
        if not same_lengths:
            raise StoreError(
                f"{self.path}: the corpus has other document lengths than the one that the teacher "
                "read, in documents that no shard holds yet. Use that corpus."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self._allow_partial)

    def _open_shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for entry in sorted(os.listdir(self.path)):
            if (documents := parse_shard_name(entry)) is not None:
                shards.append(
                    Shard(self.path / entry, documents, self.manifest.store_id, self._codecs)
                )
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

    def _shard(self, document: int) -> Shard | None:
        if not 0 <= document < self.num_documents:
            raise StoreError(
                f"{self.path}: document {document} asked for, it has {self.num_documents}."
            )
        index = bisect_right(self._firsts, document) - 1
        if index >= 0 and document in self._shards[index].documents:
            return self._shards[index]
        return None


def _reopen(path: Path, allow_partial: bool) -> LogitStore:
    return LogitStore(path, allow_partial=allow_partial)

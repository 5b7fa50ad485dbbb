"""Stores made of stores: joined, or cut into other shards. Blocks are copied as they are coded.

The documents of some parts, one after another, become the documents of a new store. All goes
through `LogitStoreWriter`: an interrupted copy loses nothing that was written and the same call
goes on where it stopped; nothing carries a shard's name before it is whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.blocks import CodedBlock
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import StoreError
from megatron_pd.store.writer import LogitStoreWriter

__all__ = [
    "SHARD_ROWS",
    "DocumentRange",
    "concatenated",
    "copy",
    "even_ranges",
    "joined",
    "joined_metadata",
    "plan_copies",
    "plan_shards",
    "whole",
]

SHARD_ROWS = 1 << 26
_FLUSH_ROWS = 1 << 20


@dataclass(frozen=True)
class DocumentRange:
    """Consecutive documents of a store."""

    store: LogitStore
    documents: range


def whole(store: LogitStore) -> list[DocumentRange]:
    return [DocumentRange(store, range(store.num_documents))]


def joined(stores: Sequence[LogitStore]) -> list[DocumentRange]:
    """The parts of stores that each hold some documents of one corpus.

    Raises:
        StoreError: another corpus, a document in two stores or in none.
    """
    first = stores[0]
    for store in stores[1:]:
        if store.lengths_digest != first.lengths_digest:
            raise StoreError(
                f"{store.path} and {first.path} are of different corpora ({store.num_documents} "
                f"and {first.num_documents} documents, or other lengths). Give stores of the same "
                "corpus, or --concatenate where their corpora were concatenated in this order."
            )
    parts = [DocumentRange(store, documents) for store in stores for documents in _present(store)]
    parts.sort(key=lambda part: (part.documents.start, part.documents.stop))
    end = 0
    for part in parts:
        if part.documents.start < end:
            raise StoreError(
                f"{part.store.path}: document {part.documents.start} is in another of the stores "
                "too. Leave one of them out, or move the shards that are there twice away."
            )
        if part.documents.start > end:
            raise StoreError(_in_none(end, part.documents.start))
        end = part.documents.stop
    if end < first.num_documents:
        raise StoreError(_in_none(end, first.num_documents))
    return parts or whole(first)  # of a corpus without documents


def concatenated(stores: Sequence[LogitStore]) -> list[DocumentRange]:
    """The parts of complete stores whose corpora were concatenated in this order."""
    return [part for store in stores for part in whole(store)]


def joined_metadata(stores: Sequence[LogitStore]) -> dict[str, Any]:
    """The first one's, and the fingerprint of the teacher where any of them knows it."""
    known = [store.metadata["fingerprint"] for store in stores if "fingerprint" in store.metadata]
    return {**stores[0].metadata, **({"fingerprint": known[0]} if known else {})}


def plan_shards(document_lengths: np.ndarray, rows: int = SHARD_ROWS) -> list[range]:
    """Contiguous document ranges of about equally many rows, and of about `rows` at most."""
    return even_ranges(document_lengths, -(-int(document_lengths.sum()) // rows))


def even_ranges(document_lengths: np.ndarray, count: int) -> list[range]:
    """About `count` contiguous document ranges of about equally many rows.

    A function of its arguments alone: an interrupted run finds its shards again."""
    if count <= 1:
        return [range(len(document_lengths))]
    total = int(document_lengths.sum())
    ends = np.cumsum(document_lengths)
    bounds = np.searchsorted(ends, np.arange(1, count) * (total / count), side="right")
    edges = np.unique([0, *bounds, len(document_lengths)])
    return [range(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def plan_copies(
    parts: Sequence[DocumentRange], document_lengths: np.ndarray, rows: int = SHARD_ROWS
) -> list[range]:
    """The shards of a copy of `parts`, as `plan_shards` has them, but none with documents of
    which only some have token digests, or a statistic: a shard has them for all or for none."""
    edges, before, first = set(), None, 0
    for part in parts:
        for documents, traits in part.store.uniform_documents():
            start = max(documents.start, part.documents.start)
            if start < min(documents.stop, part.documents.stop) and traits != before:
                edges.add(first + start - part.documents.start)
                before = traits
        first += len(part.documents)
    return [
        range(start, stop)
        for documents in plan_shards(document_lengths, rows)
        for start, stop in itertools.pairwise(
            [
                documents.start,
                *sorted(edge for edge in edges if documents.start < edge < documents.stop),
                documents.stop,
            ]
        )
    ]


def copy(
    parts: Sequence[DocumentRange],
    path: Path,
    *,
    metadata: Mapping[str, Any],
    shard_rows: int = SHARD_ROWS,
    workers: int = 1,
    progress: Progress = lambda rows: None,
) -> LogitStore:
    """Writes the store `path` whose documents are those of `parts`, or what is missing of it.

    Args:
        progress: is told rows.
    Raises:
        StoreError: parts that do not fit together, an output that is an input, damaged input.
    """
    source = _Source(parts)
    for part in parts:
        if path.resolve() == part.store.path.resolve():
            raise StoreError(f"--output {path} is an input store; choose a different path.")

    def write(documents: range, report: Progress) -> None:
        with LogitStoreWriter(
            path,
            vocab_size=source.vocab_size,
            document_lengths=source.lengths,
            metadata=metadata,
            value_bits=source.value_bits,
            statistics=sorted(source.statistics(documents)),
            token_digests=source.digests(documents),
            documents=documents,
            kind="sampled" if source.draws else "top",
            draws=source.draws,
            codecs=source.codecs,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            done = int(writer.written_rows.sum())
            report(done)
            for row, block in source.blocks(documents, done):
                writer.append_block(row, block)
                report(block.rows)

    shards = plan_copies(parts, source.lengths, shard_rows)
    for _ in run_jobs(write, shards, workers, progress):
        pass
    new = LogitStore(path)
    source.check_nothing_lost(new)
    return new


class _Source:
    """The parts as one run of documents."""

    def __init__(self, parts: Sequence[DocumentRange]) -> None:
        first = parts[0].store
        for store in (part.store for part in parts):
            for name in ("vocab_size", "draws"):
                here, there = getattr(store, name), getattr(first, name)
                if here != there:
                    raise StoreError(
                        f"{store.path} has {name} {here}, {first.path} has {there}: such rows "
                        "cannot be in one store."
                    )
        _check_one_teacher(parts)
        bits = sorted({bits for part in parts for bits in part.store.value_bits})
        if len(bits) > 1:
            raise StoreError(
                f"The stores' shards have {' and '.join(map(str, bits))} value bits; one store "
                "has one setting. Write some of them anew first: megatron-pd recode --value-bits."
            )
        self.parts = parts
        self.vocab_size, self.draws = first.vocab_size, first.draws
        self.value_bits = bits[0]
        self.codecs = sorted(
            {codec for part in parts for codec in part.store.codec_types},
            key=lambda codec: codec.name,
        )
        lengths = {id(part.store): part.store.document_lengths for part in parts}
        self.lengths = np.concatenate(
            [lengths[id(p.store)][p.documents.start : p.documents.stop] for p in parts]
        )
        self._firsts = np.cumsum([0, *(len(part.documents) for part in parts)])

    def digests(self, documents: range) -> np.ndarray | None:
        """Token digests of a shard's documents; None where they come from unbound shards."""
        digests = [np.zeros(0, np.uint64)]
        for store, there, _ in self._pieces(documents):
            found = store.token_digests(there)
            if found is None:
                return None
            digests.append(found)
        return np.concatenate(digests)

    def statistics(self, documents: range) -> set[str]:
        """Those of a shard's documents."""
        pieces = [(store, there) for store, there, _ in self._pieces(documents)]
        pieces = pieces or [(part.store, range(0)) for part in self.parts]
        return {name for store, there in pieces for name in store.statistics_of(there)}

    def blocks(self, documents: range, skip: int) -> Iterator[tuple[int, CodedBlock]]:
        """(row, block) of these documents from row `skip` on, rows counted from their first."""
        first = 0
        for store, there, rows in self._pieces(documents):
            if first + rows > skip:
                for row, block in store.coded_blocks(there, max(0, skip - first)):
                    yield first + row, block
            first += rows

    def check_nothing_lost(self, copy: LogitStore) -> None:
        """Raises StoreError unless a copy of whole stores has all their entries."""
        stores = {id(part.store): part.store for part in self.parts}.values()
        if self.lengths.sum() != sum(store.document_lengths.sum() for store in stores):
            return  # a part of a store; the writer has seen to it that each row was written
        entries = sum(store.num_entries for store in stores)
        if copy.num_entries != entries:
            raise StoreError(
                f"{copy.path}: {copy.num_entries} entries were written, the source has {entries}. "
                "It was changed in the meantime: delete the new store and start again."
            )

    def _pieces(self, documents: range) -> Iterator[tuple[LogitStore, range, int]]:
        """Where these documents lie: a store, their numbers there, and how many rows they have."""
        index = int(np.searchsorted(self._firsts, documents.start, "right")) - 1
        at = documents.start
        while at < documents.stop:
            part, first = self.parts[index], int(self._firsts[index])
            stop = min(documents.stop, int(self._firsts[index + 1]))
            if stop > at:
                begin = part.documents.start - first
                rows = int(self.lengths[at:stop].sum())
                yield part.store, range(begin + at, begin + stop), rows
            at, index = stop, index + 1


def _check_one_teacher(parts: Sequence[DocumentRange]) -> None:
    """Paths and names may differ; weights may not."""
    known = {
        part.store.metadata["fingerprint"]: part.store
        for part in parts
        if part.store.metadata.get("fingerprint") is not None
    }
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise StoreError(
            f"{second.path} is of a teacher with the fingerprint {other}, {first.path} of one with "
            f"{one}: their weights differ, so their rows can't be in one store. Join stores of one "
            "teacher, or dump the documents of one of them again."
        )


def _present(store: LogitStore) -> list[range]:
    """The documents that a store has."""
    edges = [0]
    for missing in store.missing_documents():
        edges += [missing.start, missing.stop]
    edges.append(store.num_documents)
    return [range(a, b) for a, b in itertools.batched(edges, 2) if b > a]


def _in_none(first: int, stop: int) -> str:
    return (
        f"Documents {first} to {stop - 1} are in none of the stores. Give all parts of the corpus, "
        "or complete the dump first."
    )

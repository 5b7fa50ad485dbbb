"""A journal → the store of each of its corpora.

Of the rows that a token has in several iterations the last one's is taken. A token that no
iteration had gets an empty row. All goes through `LogitStoreWriter`: an interrupted collection
goes on where it stopped, and several processes take different shards of one store.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.windows import document_groups
from megatron_pd.errors import UserError
from megatron_pd.store import (
    LogitStore,
    LogitStoreWriter,
    ShardInUseError,
    StoreError,
    TeacherRows,
)
from megatron_pd.store.admin.merge import plan_shards
from megatron_pd.store.admin.parallel import Progress
from megatron_pd.teacher.journal.segments import SPAN, Journal, Segment, fingerprint_of

__all__ = ["Collection", "captured_stores", "collect_beside_others", "collections_of", "journal_in"]

_GROUP_TOKENS = 1 << 17  # in memory at once
_FLUSH_ROWS = 1 << 17
_SEGMENT = len(SPAN)  # the column after those of a segment's own spans


@dataclass(frozen=True)
class Collection:
    """The store of one corpus, on the way from a journal."""

    number: int
    corpus: MegatronCorpus
    path: Path
    segments: list[Segment]
    description: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @functools.cached_property
    def shards(self) -> list[range]:
        """What `write` takes, one by one."""
        return plan_shards(self.corpus.document_lengths)

    def write(self, documents: range, progress: Progress = lambda rows: None) -> None:
        """The rows of a shard, or what is missing of them.

        Raises:
            ShardInUseError: another process writes it.
            StoreError: the store there is of other rows, or a segment is damaged.
        """
        description = self.description
        lengths = self.corpus.document_lengths
        with LogitStoreWriter(
            self.path,
            vocab_size=description["vocab_size"],
            document_lengths=lengths,
            metadata=self.metadata,
            kind="sampled" if description["draws"] else "top",
            draws=description["draws"],
            codec=description["codec"],
            value_bits=description["value_bits"],
            statistics=description["row_statistics"],
            corpus=self.corpus,
            documents=documents,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            written = writer.written_rows
            spans = self._spans(documents)
            own = lengths[documents.start : documents.stop]
            for group in document_groups(own, _GROUP_TOKENS):
                if (written[group] < own[group]).any():
                    rows = self._rows(documents[group], own[group], spans)
                    writer.append_run(documents[group].start, 0, rows)
                progress(int(own[group].sum()))

    def finished(self) -> LogitStore | None:
        """The store, once it is whole."""
        try:
            return LogitStore(self.path)
        except StoreError:
            return None

    def _spans(self, documents: range) -> np.ndarray:
        """The spans of these documents, by document: int64 [spans, 7], the last column is which of
        `segments` it is."""
        parts = [
            np.column_stack([spans, np.full(len(spans), number)])
            for number, segment in enumerate(self.segments)
            for spans in [segment.spans_in(self.number, documents)]
        ]
        if not parts:
            return np.zeros((0, _SEGMENT + 1), np.int64)
        spans = np.concatenate(parts)
        return spans[np.argsort(spans[:, 1], kind="stable")]

    def _rows(self, documents: range, lengths: np.ndarray, spans: np.ndarray) -> TeacherRows:
        """The rows of consecutive documents of `lengths` tokens, one document after another."""
        own = slice(*np.searchsorted(spans[:, 1], [documents.start, documents.stop]))
        segment, row = _last_of(spans[own], documents, lengths)
        at = np.flatnonzero(segment >= 0)
        # By segment, and in it as they lie there.
        at = at[np.lexsort((row[at], segment[at]))]
        begins = np.ones(len(at), bool)
        begins[1:] = (np.diff(segment[at]) != 0) | (np.diff(row[at]) != 1)
        first = np.flatnonzero(begins)
        runs = np.zeros((len(first), 3), np.int64)
        runs[:, 1], runs[:, 2] = row[at[first]], np.diff(np.append(first, len(at)))
        found = TeacherRows.empty(
            int(lengths.sum()), self._width, self.description["row_statistics"]
        )
        done = 0
        numbers = segment[at[first]]
        for number in np.unique(numbers).tolist():
            part = _read(self.segments[number].store, runs[numbers == number], found)
            found.put(at[done : done + len(part)], part)
            done += len(part)
        return found

    @functools.cached_property
    def _width(self) -> int:
        return max((segment.store.max_count for segment in self.segments), default=0)


def journal_in(directory: Path) -> Path:
    """Where the journal of `--pd-capture directory` is."""
    return directory / "journal"


def captured_stores(directory: Path, prefixes: Sequence[str]) -> dict[str, Path]:
    """Corpus prefix → its store in `--pd-capture directory`.

    Raises:
        UserError: two corpora have the same name.
    """
    names = {prefix: f"{os.path.basename(os.path.normpath(prefix))}.pd" for prefix in prefixes}
    for prefix, name in names.items():
        if other := [one for one in names if one != prefix and names[one] == name]:
            raise UserError(
                f"--pd-capture {directory}: the rows of {prefix} and of {other[0]} would both be "
                f"{name} there: give one of the corpora another name."
            )
    return {prefix: directory / name for prefix, name in names.items()}


def collect_beside_others(collections: Sequence[Collection], first: int, of: int) -> bool:
    """Write the shards that no one else is writing; returns whether all stores are whole then.

    Args:
        first, of: this process's place among those that do the same, so that they begin far apart.
    """
    for each in collections:
        begin = first * len(each.shards) // of
        for documents in each.shards[begin:] + each.shards[:begin]:
            try:
                each.write(documents)
            except ShardInUseError:
                continue
    return all(each.finished() for each in collections)


def collections_of(journal: Journal, paths: Mapping[str, Path]) -> list[Collection]:
    """What there is to collect, one for each corpus of a journal.

    Args:
        paths: corpus prefix → the store to write.
    Raises:
        UserError: nothing was written, a corpus is another one than the run had, or a store there
            is of other rows.
    """
    segments = [segment for segment in journal.segments() if segment.iterations]
    if not segments:
        raise UserError(f"{journal.path}: no row was written yet, so there is nothing to collect.")
    for segment in segments:
        segment.check()
    iterations = [both for segment in segments if (both := segment.iterations) is not None]
    description = journal.description
    metadata = {
        **description["teacher"],
        "context": "packed",
        "iterations": [min(first for first, _ in iterations), max(last for _, last in iterations)],
        "segments": len(segments),
    }
    found = []
    for number, (prefix, fingerprint) in enumerate(
        zip(journal.corpora, description["fingerprints"], strict=True)
    ):
        corpus = MegatronCorpus(prefix)
        if fingerprint_of(corpus) != fingerprint:
            raise UserError(
                f"{prefix}: these are not the tokens that the run read, whose rows are in "
                f"{journal.path}. Put that corpus back."
            )
        collection = Collection(number, corpus, paths[prefix], segments, description, metadata)
        if (store := collection.finished()) is not None and store.metadata != metadata:
            raise UserError(
                f"{collection.path}: there is a store of other rows, of iterations "
                f"{store.metadata.get('iterations')}; the journal has {metadata['iterations']}: "
                "move it away."
            )
        found.append(collection)
    return found


def _last_of(
    spans: np.ndarray, documents: range, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of the documents, the segment and the row of the last iteration: int64
    [tokens] each, −1 where there is none."""
    starts = np.cumsum(lengths) - lengths
    columns = dict(zip((*SPAN, "segment"), spans.T, strict=True))
    order = np.lexsort((columns["row"], columns["segment"], columns["iteration"]))
    length = columns["length"][order]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    first = starts[columns["document"][order] - documents.start] + columns["offset"][order]
    at = np.repeat(first, length) + within
    segment, row = np.full((2, int(lengths.sum())), -1, np.int64)
    # Of an index that comes several times the last value stays.
    segment[at] = np.repeat(columns["segment"][order], length)
    row[at] = np.repeat(columns["row"][order], length) + within
    return segment, row


def _read(store: LogitStore, runs: np.ndarray, like: TeacherRows) -> TeacherRows:
    """The rows of the spans `runs` of a segment, as wide and with the statistics of `like`."""
    rows = TeacherRows.empty(int(runs[:, 2].sum()), like.ids.shape[1], tuple(like.statistics))
    store.gather(runs, rows.ids, rows.logprobs, rows.counts, rows.statistics)
    return rows

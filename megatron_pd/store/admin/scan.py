"""Reads of many rows in pieces that fit in memory, whatever the documents' lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import TeacherRows

__all__ = ["document_groups", "sampled_documents", "scan_documents"]

_PIECE_ENTRIES = 1 << 22
_GROUP_ROWS = 1 << 20


def scan_documents(
    store: LogitStore, documents: np.ndarray
) -> Iterator[tuple[int, int, TeacherRows]]:
    """(document, offset, rows) of documents in ascending order, at most some 4 million entries at
    once. The rows go on over the ends of documents that follow each other, so that short ones cost
    no more than long ones."""
    at_once = max(1024, _PIECE_ENTRIES // max(1, store.max_count))
    for run in np.split(documents, np.flatnonzero(np.diff(documents) != 1) + 1):
        if len(run):
            yield from store.scan(range(int(run[0]), int(run[-1]) + 1), at_once)


def sampled_documents(store: LogitStore, max_rows: int | None) -> np.ndarray:
    """Non-empty documents in corpus order, spread evenly so that they hold about `max_rows` rows
    (None: all of them)."""
    lengths = store.document_lengths
    stride = 1 if max_rows is None else max(1, math.ceil(lengths.sum() / max(1, max_rows)))
    return np.flatnonzero(lengths)[::stride]


def document_groups(store: LogitStore, documents: np.ndarray) -> list[np.ndarray]:
    """The documents in runs of about a million rows: jobs for several processes."""
    ends = np.cumsum(store.document_lengths[documents])
    return [
        group
        for group in np.split(
            documents, np.flatnonzero(np.diff(ends // _GROUP_ROWS)) + 1 if len(ends) else []
        )
        if len(group)
    ]

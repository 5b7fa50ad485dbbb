"""Reads of many rows in pieces that fit in memory, whatever the documents' lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import TeacherRows

__all__ = ["document_groups", "sampled_documents", "scan"]

_PIECE_ENTRIES = 1 << 22
_GROUP_ROWS = 1 << 20


def scan(store: LogitStore, document: int, offset: int = 0) -> Iterator[TeacherRows]:
    """The rows of a document from `offset` on, at most some 4 million entries at once."""
    at_once = max(1024, _PIECE_ENTRIES // max(1, store.max_count))
    length = store.document_length(document)
    while offset < length:
        rows = store.read(document, offset, min(at_once, length - offset))
        yield rows
        offset += len(rows)


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

"""How far the documents of a shard are while it is written."""

from __future__ import annotations

import numpy as np

__all__ = ["DocumentRows"]


class DocumentRows:
    """Documents are counted from the shard's first, and so are rows.

    Attributes:
        starts: int64 [documents + 1], first row of every document, and the end of the last.
        appended: int64 [documents], rows that were given to the writer.
        durable: int64 [documents], those of them that no crash can lose.
        digests: uint64 [documents], of the documents' tokens, where they are known.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.appended = np.zeros(len(lengths), np.int64)
        self.durable = np.zeros(len(lengths), np.int64)
        self.digests = np.zeros(len(lengths), np.uint64)

    def length(self, document: int) -> int:
        return int(self.starts[document + 1] - self.starts[document])

    def add(self, row: int, end: int) -> None:
        """The rows [row, end) were appended."""
        first = self._document_of(row)
        last = int(np.searchsorted(self.starts, end, "left"))
        ends = np.minimum(end, self.starts[first + 1 : last + 1])
        self.appended[first:last] = ends - self.starts[first:last]

    def position(self, row: int) -> tuple[int, int]:
        """(document, offset) of a row."""
        document = self._document_of(row)
        return document, row - int(self.starts[document])

    def is_next(self, row: int) -> bool:
        """Whether a row is the one that its document lacks next."""
        document = self._document_of(row)
        return bool(row - self.starts[document] == self.appended[document])

    def are_next(self, row: int, end: int) -> bool:
        """Whether the rows [row, end) exist, and are those that their documents lack next."""
        if not 0 <= row < end <= self.starts[-1] or not self.is_next(row):
            return False
        last = int(np.searchsorted(self.starts, end, "left"))
        return not self.appended[self._document_of(row) + 1 : last].any()

    def last_in(self, row: int, end: int) -> np.ndarray:
        """Which of the rows [row, end) are the last of their document, counted from `row`."""
        first = self._document_of(row)
        last = int(np.searchsorted(self.starts, end, "right")) - 1
        ends = self.starts[first + 1 : last + 1]
        return ends[self.starts[first:last] < ends] - 1 - row

    def begun_in(self, row: int, end: int) -> np.ndarray:
        """Non-empty documents whose first row is in [row, end)."""
        first, last = np.searchsorted(self.starts[:-1], [row, end], "left")
        documents = np.arange(first, last)
        return documents[self.starts[documents] < self.starts[documents + 1]]

    def incomplete(self) -> np.ndarray:
        """Documents that lack rows."""
        return np.flatnonzero(self.appended < np.diff(self.starts))

    def _document_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, "right")) - 1

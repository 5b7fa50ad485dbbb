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

    def lacking(self, row: int, end: int) -> np.ndarray | None:
        """Those of the rows [row, end) that were not appended: int64 [runs, 2], the first of each
        run and its end. None: there are no such rows, or a document lacks rows before them."""
        if not 0 <= row <= end <= self.starts[-1]:
            return None
        which = slice(self._document_of(row), int(np.searchsorted(self.starts, end, "left")))
        starts = self.starts[which]
        begins = starts + self.appended[which]
        if (np.maximum(row, starts) > begins).any():
            return None
        ends = np.minimum(end, self.starts[1:][which])
        lacks = begins < ends
        begins, ends = begins[lacks], ends[lacks]
        joined = begins[1:] == ends[:-1]
        return np.stack(
            [
                np.delete(begins, np.flatnonzero(joined) + 1),
                np.delete(ends, np.flatnonzero(joined)),
            ],
            axis=1,
        )

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

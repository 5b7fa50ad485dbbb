"""Rows that wait to be written, so that those of neighbouring documents share blocks."""

from __future__ import annotations

from megatron_pd.store.ragged import RaggedRows

__all__ = ["PendingRows"]


class PendingRows:
    """Rows by where they belong in the shard, in the order in which they came.

    Attributes:
        nbytes: about how much memory they take.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._runs: dict[int, list[RaggedRows]] = {}  # by first row
        self._start_of: dict[int, int] = {}  # first row of the run that ends there

    def add(self, row: int, rows: RaggedRows) -> None:
        """Rows of which the first is the shard's row `row`."""
        start = self._start_of.pop(row, row)
        self._runs.setdefault(start, []).append(rows)
        self._start_of[row + len(rows)] = start
        self.nbytes += 8 * len(rows.ids) + 16 * len(rows) + 1024

    def take(self) -> list[tuple[int, RaggedRows]]:
        """(first row, rows) of all that waits, by row, what lies side by side in one piece; none
        of it waits any more."""
        end_of = {start: end for end, start in self._start_of.items()}
        joined: list[tuple[int, list[RaggedRows]]] = []
        joined_end = -1
        for start in sorted(self._runs):
            if start != joined_end:
                joined.append((start, []))
            joined[-1][1].extend(self._runs[start])
            joined_end = end_of[start]
        self._runs.clear()
        self._start_of.clear()
        self.nbytes = 0
        return [(row, RaggedRows.concatenate(parts)) for row, parts in joined]

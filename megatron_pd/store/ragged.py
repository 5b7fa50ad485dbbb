"""Rows without padding, as codecs take and give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.types import StoreError, TeacherRows

__all__ = ["MAX_MASS", "RaggedRows"]

#: Of a row: probabilities sum to 1, and rounding adds less than this.
MAX_MASS = 1 + 1e-3


@dataclass
class RaggedRows:
    """Rows one after another.

    counts      int32 [n]: entries of each row.
    ids         int32 [sum of counts]: vocabulary ids, of each row by falling log-probability.
    logprobs    float32 [sum of counts], as in `TeacherRows`.
    statistics  float32 [n] each, as in `TeacherRows`.
    """

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rows: TeacherRows, vocab_size: int, draws: int, where: Callable[[int], str]
    ) -> RaggedRows:
        """A copy; StoreError unless every row is one that a store can hold.

        Args:
            where: what a message about a row begins with.
        """
        counts = np.array(rows.counts, np.int32, order="C")
        ids = np.ascontiguousarray(rows.ids, np.int32)
        logprobs = np.ascontiguousarray(rows.logprobs, np.float32)
        try:
            flat = _logit_codec.ragged(ids, logprobs, counts, vocab_size, draws)
        except _logit_codec.BadRowsError as error:
            raise StoreError(
                f"{where(0)}: of the rows from there on, {error}. Check what the teacher gave."
            ) from None
        statistics = {
            name: np.array(values, np.float32) for name, values in rows.statistics.items()
        }
        if any(values.shape != counts.shape for values in statistics.values()):
            raise StoreError(f"{where(0)}: each statistic must have one value per row.")
        ragged = cls(counts, *flat, statistics)
        if (row := ragged.too_heavy()) is not None:
            raise StoreError(
                f"{where(row)}: its {counts[row]} entries have a mass of "
                f"{ragged.masses()[row]:.4f}, probabilities at most 1. Log-probabilities are "
                "natural logarithms, over the full vocabulary, at temperature 1."
            )
        return ragged

    @classmethod
    def concatenate(cls, parts: list[RaggedRows]) -> RaggedRows:
        return cls(
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            {
                name: np.concatenate([part.statistics[name] for part in parts])
                for name in parts[0].statistics
            },
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice) -> RaggedRows:
        """Consecutive rows, as views."""
        start, stop, _ = rows.indices(len(self))
        first, last = int(self.counts[:start].sum()), int(self.counts[:stop].sum())
        statistics = {name: values[rows] for name, values in self.statistics.items()}
        return RaggedRows(
            self.counts[rows], self.ids[first:last], self.logprobs[first:last], statistics
        )

    def masses(self) -> np.ndarray:
        """Probability mass of each row's entries: float64 [n], 0 for rows without entries."""
        probs = np.zeros(len(self.logprobs) + 1, np.float32)  # so that every start is in it
        np.exp(self.logprobs, out=probs[:-1])
        sums = np.add.reduceat(probs, np.cumsum(self.counts) - self.counts, dtype=np.float64)
        sums[self.counts == 0] = 0  # reduceat gives the entry that is there
        return sums

    def too_heavy(self) -> int | None:
        """The first row whose mass is beyond `MAX_MASS`."""
        heavy = self.masses() > MAX_MASS
        return int(heavy.argmax()) if heavy.any() else None

    def blocks(self, size: int) -> list[RaggedRows]:
        """The rows in runs of `size`."""
        ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        parts = []
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            first, last = ends[start], ends[stop]
            statistics = {name: values[start:stop] for name, values in self.statistics.items()}
            rows = (self.counts[start:stop], self.ids[first:last], self.logprobs[first:last])
            parts.append(RaggedRows(*rows, statistics))
        return parts

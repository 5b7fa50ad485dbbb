"""Rows without padding, as codecs take and give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.types import StoreError, TeacherRows

__all__ = ["RaggedRows"]


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
    def of(cls, rows: TeacherRows, vocab_size: int, draws: int, where: str) -> RaggedRows:
        """A copy; StoreError unless every row is one that a store can hold."""
        counts = np.array(rows.counts, np.int32, order="C")
        ids = np.ascontiguousarray(rows.ids, np.int32)
        logprobs = np.ascontiguousarray(rows.logprobs, np.float32)
        try:
            flat = _logit_codec.ragged(ids, logprobs, counts, vocab_size, draws)
        except _logit_codec.BadRowsError as error:
            raise StoreError(f"{where}, {error}. Check what the teacher gave.") from None
        statistics = {
            name: np.array(values, np.float32) for name, values in rows.statistics.items()
        }
        if any(values.shape != counts.shape for values in statistics.values()):
            raise StoreError(f"{where}: each statistic must have one value per row.")
        return cls(counts, *flat, statistics)

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

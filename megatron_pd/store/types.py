"""What goes into a logit store and comes out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_pd.errors import UserError

__all__ = [
    "STATISTICS",
    "Corpus",
    "Layout",
    "ShardInUseError",
    "StoreError",
    "TeacherRows",
    "statistics_in",
    "statistics_mask",
]

#: Optional per-row float32 values, in the order of their bits in a block's header.
STATISTICS = ("label_logprob", "entropy", "std")


def statistics_mask(names: Collection[str]) -> int:
    """A bit for each of `STATISTICS` that is among the names."""
    return sum(1 << bit for bit, name in enumerate(STATISTICS) if name in names)


def statistics_in(mask: int) -> tuple[str, ...]:
    """The names in a `statistics_mask`, in the order of `STATISTICS`."""
    return tuple(name for bit, name in enumerate(STATISTICS) if mask >> bit & 1)


class StoreError(UserError):
    """A logit store, or a request to one, is wrong; the message says where, how and the fix."""

    exit_status = 1


class ShardInUseError(StoreError):
    """Another process writes this shard at the moment."""


class Corpus(Protocol):
    """The tokens that a store's rows belong to (Megatron's `.bin/.idx`, or anything alike)."""

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [D]: tokens of every document, its end-of-document token included."""

    def tokens(self, document: int) -> np.ndarray:
        """The token ids of one document: 1-D, any integer dtype."""


@dataclass(frozen=True)
class Layout:
    """What a shard says about all of its rows.

    vocab_size  how many ids there are; an id is below it.
    draws       draws of every row that isn't empty; 0 for top rows.
    value_bits  resolution of the codecs that quantize log-probabilities.
    """

    vocab_size: int
    draws: int
    value_bits: int


@dataclass(frozen=True)
class TeacherRows:
    """The sparse next-token distributions of n consecutive tokens.

    ids         int32 [n, K]: vocabulary ids by falling log-probability, -1 beyond a row's count.
    logprobs    float32 [n, K]: log-probabilities over the full vocabulary at temperature 1, never
                renormalised, in nats; 0 beyond a row's count.  Of a store of the `sampled` kind:
                log(draws of the id / draws of the row).
    counts      int32 [n]: entries of each row; 0 where there is no teacher.
    statistics  float32 [n] each, of `STATISTICS`: `label_logprob` (log-probability of the true next
                token), `entropy` (of the full distribution, nats), `std` (of the full logits).
    """

    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice | np.ndarray) -> TeacherRows:
        statistics = {name: values[rows] for name, values in self.statistics.items()}
        return TeacherRows(self.ids[rows], self.logprobs[rows], self.counts[rows], statistics)

    @classmethod
    def empty(cls, n: int, width: int = 0, statistics: Collection[str] = ()) -> TeacherRows:
        """`n` rows without entries, and with these statistics, all NaN."""
        ids = np.full((n, width), -1, np.int32)
        unknown = {name: np.full(n, np.nan, np.float32) for name in statistics}
        return cls(ids, np.zeros((n, width), np.float32), np.zeros(n, np.int32), unknown)

    def put(self, at: np.ndarray, rows: TeacherRows) -> None:
        """Write `rows`, which are no wider, over those with the numbers `at`, int64 [rows]."""
        width = rows.ids.shape[1]
        self.ids[at, :width] = rows.ids
        self.logprobs[at, :width] = rows.logprobs
        self.counts[at] = rows.counts
        for name, values in self.statistics.items():
            values[at] = rows.statistics[name]

    @classmethod
    def concatenate(cls, parts: list[TeacherRows]) -> TeacherRows:
        """The rows of `parts` one after another, padded to the widest."""
        width = max((part.ids.shape[1] for part in parts), default=0)
        out = cls.empty(sum(len(part) for part in parts), width)
        row = 0
        for part in parts:
            out.ids[row : row + len(part), : part.ids.shape[1]] = part.ids
            out.logprobs[row : row + len(part), : part.ids.shape[1]] = part.logprobs
            out.counts[row : row + len(part)] = part.counts
            row += len(part)
        names = [name for name in STATISTICS if any(name in part.statistics for part in parts)]
        statistics = {
            name: np.concatenate(
                [
                    part.statistics.get(name, np.full(len(part), np.nan, np.float32))
                    for part in parts
                ]
            )
            for name in names
        }
        return cls(out.ids, out.logprobs, out.counts, statistics)

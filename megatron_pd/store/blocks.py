"""Blocks of rows: from padded arrays to checked frames and back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_pd.store.format import EXACT, ROWS_FRAME, FrameHeader
from megatron_pd.store.rows import COLUMNS, TeacherRows

__all__ = ["RaggedRows", "decode_exact", "encode_frame"]


@dataclass
class RaggedRows:
    """Rows without padding: counts [n], ids and logprobs [sum of counts], columns [n]."""

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    columns: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, rows: TeacherRows) -> RaggedRows:
        mask = np.arange(rows.ids.shape[1]) < rows.counts[:, None]
        columns = {k: np.array(v, np.float32) for k, v in rows.columns.items()}
        return cls(np.array(rows.counts, np.int32), rows.ids[mask], rows.logprobs[mask], columns)

    @classmethod
    def concatenate(cls, parts: list[RaggedRows]) -> RaggedRows:
        return cls(
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
            {
                name: np.concatenate([part.columns[name] for part in parts])
                for name in parts[0].columns
            },
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice) -> RaggedRows:
        start, stop, _ = rows.indices(len(self))
        first, last = int(self.counts[:start].sum()), int(self.counts[:stop].sum())
        return RaggedRows(
            self.counts[rows],
            self.ids[first:last],
            self.logprobs[first:last],
            {name: column[rows] for name, column in self.columns.items()},
        )

    def fill(self, out_ids: np.ndarray, out_logprobs: np.ndarray, width: int) -> np.ndarray:
        """Writes the first `width` entries of every row into the [n, width] buffers, and leaves
        what lies beyond a row's count as it is; returns the counts so limited."""
        counts = np.minimum(self.counts, width)
        mask = np.arange(width) < counts[:, None]
        if (self.counts <= width).all():
            out_ids[mask], out_logprobs[mask] = self.ids, self.logprobs
            return counts
        firsts = np.cumsum(self.counts, dtype=np.int64) - self.counts
        kept = (firsts[:, None] + np.arange(width))[mask]
        out_ids[mask], out_logprobs[mask] = self.ids[kept], self.logprobs[kept]
        return counts

    def padded(self, width: int) -> TeacherRows:
        out = TeacherRows.empty(len(self), width)
        counts = self.fill(out.ids, out.logprobs, width)
        return TeacherRows(out.ids, out.logprobs, counts.astype(np.int32), self.columns)

    def in_range(self, vocab_size: int) -> bool:
        """True when the counts add up and every id is of the vocabulary."""
        if (self.counts < 0).any() or self.counts.sum(dtype=np.int64) != len(self.ids):
            return False
        return not len(self.ids) or bool(self.ids.min() >= 0 and self.ids.max() < vocab_size)


def encode_frame(rows: RaggedRows, row: int, digests: np.ndarray) -> bytes:
    """A frame of rows of which the first is the shard's row `row`."""
    names = [name for name in COLUMNS if name in rows.columns]
    payload = b"".join(
        [
            digests.astype("<u8").tobytes(),
            rows.counts.astype("<i4").tobytes(),
            rows.ids.astype("<i4").tobytes(),
            rows.logprobs.astype("<f4").tobytes(),
            *(rows.columns[name].astype("<f4").tobytes() for name in names),
        ]
    )
    header = FrameHeader(
        ROWS_FRAME,
        EXACT,
        sum(1 << COLUMNS.index(name) for name in names),
        len(rows),
        len(payload),
        row,
        0,
        len(rows.ids),
        int(rows.counts.max(initial=0)),
        zlib.crc32(payload),
    )
    return header.to_bytes() + payload


def decode_exact(header: FrameHeader, payload: bytes, digests: int) -> RaggedRows | None:
    """The rows of a frame whose payload starts with `digests` token digests; None where the
    payload is not as long as the header says."""
    names = [name for bit, name in enumerate(COLUMNS) if header.columns >> bit & 1]
    size = 8 * digests + 4 * header.rows * (1 + len(names)) + 8 * header.entries
    if len(payload) != size:
        return None
    position = 8 * digests

    def take(dtype: str, n: int) -> np.ndarray:
        nonlocal position
        array = np.frombuffer(payload, dtype, n, position)
        position += array.nbytes
        return array

    counts = take("<i4", header.rows)
    ids, logprobs = take("<i4", header.entries), take("<f4", header.entries)
    return RaggedRows(counts, ids, logprobs, {name: take("<f4", header.rows) for name in names})

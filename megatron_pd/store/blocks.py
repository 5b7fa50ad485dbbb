"""Blocks of rows: from padded arrays to checked frames."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.format import COMPACT, EXACT, ROWS_FRAME, TABLES_FRAME, FrameHeader
from megatron_pd.store.rows import COLUMNS, StoreError, TeacherRows

__all__ = ["RaggedRows", "Tables", "encode_frame", "tables_frame"]

_COLUMN_DTYPES = {EXACT: "<f4", COMPACT: "<f2"}


@dataclass
class RaggedRows:
    """Rows without padding: counts [n], ids and logprobs [sum of counts], columns [n]."""

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    columns: Mapping[str, np.ndarray]

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
        columns = {name: np.array(column, np.float32) for name, column in rows.columns.items()}
        if any(column.shape != counts.shape for column in columns.values()):
            raise StoreError(f"{where}: each column must have one value per row.")
        return cls(counts, *flat, columns)

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

    def blocks(self, size: int) -> list[RaggedRows]:
        """The rows in runs of `size`."""
        ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        parts = []
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            first, last = ends[start], ends[stop]
            columns = {name: column[start:stop] for name, column in self.columns.items()}
            rows = (self.counts[start:stop], self.ids[first:last], self.logprobs[first:last])
            parts.append(RaggedRows(*rows, columns))
        return parts


@dataclass
class Tables:
    """Tables in use by a writer: the coder made of them and where their frame lies."""

    encoder: _logit_codec.BlockEncoder
    offset: int


def tables_frame(payload: bytes) -> bytes:
    """A frame of trained tables."""
    header = FrameHeader(
        TABLES_FRAME, COMPACT, 0, 0, len(payload), 0, 0, 0, 0, 0, zlib.crc32(payload)
    )
    return header.to_bytes() + payload


def encode_frame(rows: RaggedRows, row: int, digests: np.ndarray, tables: Tables | None) -> bytes:
    """A frame of rows of which the first is the shard's row `row`: `compact` with tables, else
    `exact`."""
    codec = EXACT if tables is None else COMPACT
    arrays = (rows.counts, rows.ids, rows.logprobs)
    stream = (
        _logit_codec.encode_exact(*arrays) if tables is None else tables.encoder.encode(*arrays)
    )
    names = [name for name in COLUMNS if name in rows.columns]
    columns = [rows.columns[name].astype(_COLUMN_DTYPES[codec]).tobytes() for name in names]
    payload = b"".join([digests.astype("<u8").tobytes(), *columns, stream])
    header = FrameHeader(
        ROWS_FRAME,
        codec,
        sum(1 << COLUMNS.index(name) for name in names),
        len(rows),
        len(payload),
        row,
        0 if tables is None else tables.offset,
        len(rows.ids),
        int(rows.counts.max(initial=0)),
        len(digests),
        zlib.crc32(payload),
    )
    return header.to_bytes() + payload

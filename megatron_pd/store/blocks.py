"""Blocks of rows: from padded arrays to checked frames."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.format import (
    COMPACT,
    EXACT,
    ROWS_FRAME,
    TABLES_FRAME,
    FrameHeader,
    ShardHeader,
)
from megatron_pd.store.types import STATISTICS, StoreError, TeacherRows

__all__ = ["CodedBlock", "RaggedRows", "Tables", "encode_frame", "tables_frame"]

_STATISTICS_DTYPES = {EXACT: "<f4", COMPACT: "<f2"}


@dataclass
class RaggedRows:
    """Rows without padding: counts [n], ids and logprobs [sum of counts], statistics [n]."""

    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    statistics: Mapping[str, np.ndarray]

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


@dataclass
class Tables:
    """Tables in use by a writer: the coder made of them and where their frame lies."""

    encoder: _logit_codec.CompactCoder
    offset: int


def tables_frame(payload: bytes) -> bytes:
    """A frame of trained tables."""
    header = FrameHeader(
        TABLES_FRAME, COMPACT, 0, 0, len(payload), 0, 0, 0, 0, 0, zlib.crc32(payload)
    )
    return header.to_bytes() + payload


@dataclass(frozen=True)
class CodedBlock:
    """Coded rows on their way into a shard."""

    codec: int
    statistics: int  # a bit for each of STATISTICS
    rows: int
    entries: int
    max_count: int
    body: bytes  # the statistics, then the codec's stream
    tables: bytes | None  # payload of the tables that a `compact` stream was coded with

    def frame(self, row: int, digests: np.ndarray, tables_offset: int) -> bytes:
        """The frame of these rows, of which the first is the shard's row `row`."""
        payload = digests.astype("<u8").tobytes() + self.body
        header = FrameHeader(
            ROWS_FRAME,
            self.codec,
            self.statistics,
            self.rows,
            len(payload),
            row,
            tables_offset,
            self.entries,
            self.max_count,
            len(digests),
            zlib.crc32(payload),
        )
        return header.to_bytes() + payload

    def part(self, start: int, stop: int, counts: np.ndarray, shard: ShardHeader) -> CodedBlock:
        """The rows [start, stop) of the block, bit by bit what they were. `counts`: of all rows."""
        value_bytes = np.dtype(_STATISTICS_DTYPES[self.codec]).itemsize
        statistics_end = self.statistics.bit_count() * self.rows * value_bytes
        values = np.frombuffer(self.body, np.uint8, statistics_end).reshape(
            -1, self.rows, value_bytes
        )
        stream = self.body[statistics_end:]
        if self.codec == EXACT:
            stream = _part_of_exact(stream, counts, start, stop)
        else:
            assert self.tables is not None
            layout = (shard.vocab_size, shard.draws, shard.value_bits)
            encoder = _logit_codec.CompactCoder(self.tables, *layout)
            stream = encoder.slice(stream, self.rows, self.entries, start, stop - start)
        kept = counts[start:stop]
        return replace(
            self,
            rows=stop - start,
            entries=int(kept.sum()),
            max_count=int(kept.max(initial=0)),
            body=values[:, start:stop].tobytes() + stream,
        )


def _part_of_exact(stream: bytes, counts: np.ndarray, start: int, stop: int) -> bytes:
    first, last = int(counts[:start].sum()), int(counts[:stop].sum())
    ids = 4 * len(counts)
    logprobs = ids + 3 * int(counts.sum())
    return b"".join(
        [
            stream[4 * start : 4 * stop],
            stream[ids + 3 * first : ids + 3 * last],
            stream[logprobs + 4 * first : logprobs + 4 * last],
        ]
    )


def encode_frame(rows: RaggedRows, row: int, digests: np.ndarray, tables: Tables | None) -> bytes:
    """A frame of rows of which the first is the shard's row `row`: `compact` with tables, else
    `exact`."""
    codec = EXACT if tables is None else COMPACT
    arrays = (rows.counts, rows.ids, rows.logprobs)
    stream = (
        _logit_codec.encode_exact(*arrays) if tables is None else tables.encoder.encode(*arrays)
    )
    names = [name for name in STATISTICS if name in rows.statistics]
    statistics = [
        rows.statistics[name].astype(_STATISTICS_DTYPES[codec]).tobytes() for name in names
    ]
    block = CodedBlock(
        codec,
        sum(1 << STATISTICS.index(name) for name in names),
        len(rows),
        len(rows.ids),
        int(rows.counts.max(initial=0)),
        b"".join([*statistics, stream]),
        None,
    )
    return block.frame(row, digests, 0 if tables is None else tables.offset)

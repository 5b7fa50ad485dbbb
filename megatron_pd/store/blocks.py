"""Coded rows on their way into a shard: blocks, and the entropy models that they are coded with."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_pd.store.codecs import Codec
from megatron_pd.store.format import MODEL_FRAME, ROWS_FRAME, FrameHeader
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import STATISTICS, Layout

__all__ = ["CodedBlock", "EntropyModel"]


@dataclass(frozen=True)
class EntropyModel:
    """What a codec's trainer made, or was found in a shard."""

    codec: type[Codec]
    payload: bytes

    @cached_property
    def key(self) -> bytes:
        """Tells models apart."""
        return hashlib.blake2b(self.payload, digest_size=16).digest()

    def frame(self, codec_number: int) -> tuple[FrameHeader, bytes]:
        """Header and payload."""
        size, crc = len(self.payload), zlib.crc32(self.payload)
        header = FrameHeader(MODEL_FRAME, codec_number, 0, 0, size, 0, 0, 0, 0, 0, crc)
        return header, self.payload


@dataclass(frozen=True)
class CodedBlock:
    """Coded rows.

    statistics  a bit for each of `STATISTICS`.
    body        the statistics' values, then the codec's stream.
    model       what the stream was coded with; None for a codec without.
    """

    codec: type[Codec]
    statistics: int
    rows: int
    entries: int
    max_count: int
    body: bytes
    model: EntropyModel | None

    @classmethod
    def of(cls, rows: RaggedRows, coder: Codec, model: EntropyModel | None) -> CodedBlock:
        """Codes rows with a codec that has this model."""
        codec = type(coder)
        names = [name for name in STATISTICS if name in rows.statistics]
        values = [rows.statistics[name].astype(codec.statistics_dtype).tobytes() for name in names]
        return cls(
            codec,
            sum(1 << STATISTICS.index(name) for name in names),
            len(rows),
            len(rows.ids),
            int(rows.counts.max(initial=0)),
            b"".join([*values, coder.encode(rows)]),
            model,
        )

    def frame(
        self, codec_number: int, row: int, digests: np.ndarray, model_offset: int
    ) -> tuple[FrameHeader, bytes]:
        """Header and payload of the rows, of which the first is the shard's row `row`."""
        payload = digests.astype("<u8").tobytes() + self.body
        header = FrameHeader(
            ROWS_FRAME,
            codec_number,
            self.statistics,
            self.rows,
            len(payload),
            row,
            model_offset,
            self.entries,
            self.max_count,
            len(digests),
            zlib.crc32(payload),
        )
        return header, payload

    def too_heavy(self, layout: Layout) -> int | None:
        """The first row whose mass is beyond that of a distribution."""
        if self.codec.normalises:
            return None
        value_bytes = np.dtype(self.codec.statistics_dtype).itemsize
        stream = self.body[self.statistics.bit_count() * self.rows * value_bytes :]
        coder = self.codec(layout, None if self.model is None else self.model.payload)
        return coder.decode(stream, self.rows, self.entries).too_heavy()

    def part(self, start: int, stop: int, counts: np.ndarray, layout: Layout) -> CodedBlock:
        """The rows [start, stop) of the block, bit by bit what they were. `counts`: of all rows."""
        value_bytes = np.dtype(self.codec.statistics_dtype).itemsize
        statistics_end = self.statistics.bit_count() * self.rows * value_bytes
        values = np.frombuffer(self.body, np.uint8, statistics_end)
        values = values.reshape(-1, self.rows, value_bytes)[:, start:stop]
        coder = self.codec(layout, None if self.model is None else self.model.payload)
        stream = coder.slice(self.body[statistics_end:], self.rows, self.entries, start, stop)
        kept = counts[start:stop]
        return replace(
            self,
            rows=stop - start,
            entries=int(kept.sum()),
            max_count=int(kept.max(initial=0)),
            body=values.tobytes() + stream,
        )

"""Codec `exact`: float32 log-probabilities as they were given; 7 bytes an entry."""

from __future__ import annotations

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.codecs.codec import Codec
from megatron_pd.store.ragged import RaggedRows

__all__ = ["ExactCodec"]


class ExactCodec(Codec):
    name, version = "exact", 1

    def encode(self, rows: RaggedRows) -> bytes:
        return _logit_codec.encode_exact(rows.counts, rows.ids, rows.logprobs)

    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        return RaggedRows(*_logit_codec.decode_exact(stream, rows, entries, self.layout.vocab_size))

    def slice(self, stream: bytes, rows: int, entries: int, first: int, stop: int) -> bytes:
        counts = np.frombuffer(stream, "<i4", rows)
        begin, end = int(counts[:first].sum()), int(counts[:stop].sum())
        ids_at, logprobs_at = 4 * rows, 4 * rows + 3 * entries
        return b"".join(
            [
                stream[4 * first : 4 * stop],
                stream[ids_at + 3 * begin : ids_at + 3 * end],
                stream[logprobs_at + 4 * begin : logprobs_at + 4 * end],
            ]
        )

"""Codec `compact`: entropy-coded ids and quantized log-probabilities (docs/store-format.md)."""

from __future__ import annotations

from megatron_pd.store import _logit_codec
from megatron_pd.store.codecs.codec import Codec
from megatron_pd.store.codecs.training import EntropyModelTrainer
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import Layout

__all__ = ["CompactCodec"]


class CompactCodec(Codec):
    name, version = "compact", 1
    statistics_dtype = "<f2"
    normalises = True

    def __init__(self, layout: Layout, model: bytes | None) -> None:
        super().__init__(layout, model)
        if model is None:
            raise ValueError("The codec compact codes with an entropy model, and there is none.")
        self._coder = _logit_codec.CompactCoder(
            model, layout.vocab_size, layout.draws, layout.value_bits
        )

    def encode(self, rows: RaggedRows) -> bytes:
        return self._coder.encode(rows.counts, rows.ids, rows.logprobs)

    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        return RaggedRows(*self._coder.decode(stream, rows, entries))

    def slice(self, stream: bytes, rows: int, entries: int, first: int, stop: int) -> bytes:
        return self._coder.slice(stream, rows, entries, first, stop)

    @classmethod
    def trainer(cls, layout: Layout) -> EntropyModelTrainer:
        return EntropyModelTrainer(layout)

"""The entropy models of a `compact` shard while it is written: trained on the rows seen so far."""

from __future__ import annotations

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import Layout

__all__ = ["EntropyModelTrainer"]

_GROWTH = 4  # a new model when so many times the entries were seen that the last was made of
_ENTRIES = 1 << 26  # and none any more after so many: it would hardly change


class EntropyModelTrainer:
    """Says when the next blocks get a new model, and makes it.

    A model made of the first rows fits later ones less well, so it is made again whenever the
    entries seen have grown fourfold: a handful of times, each time at most a few percent of what is
    written.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._id_counts = np.zeros(layout.vocab_size, np.uint64)
        self._has_model = False
        self._seen = self._trained = 0

    def found_model(self, model: bytes) -> None:
        self._has_model, self._trained = True, self._seen

    def found_rows(self, entries: int) -> None:
        self._seen += entries

    def train(self, runs: list[RaggedRows]) -> bytes | None:
        layout = self._layout
        for rows in runs:
            counts = np.bincount(rows.ids, minlength=layout.vocab_size)
            self._id_counts += counts.astype(np.uint64)
            self._seen += len(rows.ids)
        if self._has_model and (self._seen < _GROWTH * self._trained or self._trained >= _ENTRIES):
            return None
        sample = RaggedRows.concatenate(runs)
        self._has_model, self._trained = True, self._seen
        return _logit_codec.train(
            layout.vocab_size,
            layout.draws,
            layout.value_bits,
            self._id_counts,
            sample.counts,
            sample.ids,
            sample.logprobs,
        )

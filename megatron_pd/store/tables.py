"""The tables of a `compact` shard while it is written: trained on the rows seen so far."""

from __future__ import annotations

import numpy as np

from megatron_pd.store import _logit_codec
from megatron_pd.store.blocks import RaggedRows, Tables

__all__ = ["TablesTrainer"]

_GROWTH = 4  # new tables when so many times the entries were seen that the last were made of
_ENTRIES = 1 << 26  # and none any more after so many: they would hardly change


class TablesTrainer:
    """Keeps the tables that the next blocks are coded with.

    Tables made of the first rows fit later ones less well, so they are made again whenever the
    entries seen have grown fourfold: a handful of times, each time at most a few percent of what is
    written.
    """

    def __init__(self, vocab_size: int, draws: int, value_bits: int) -> None:
        self._layout = (vocab_size, draws, value_bits)
        self._id_counts = np.zeros(vocab_size, np.uint64)
        self._seen = self._trained = 0
        self.tables: Tables | None = None

    def resume(self, payload: bytes, offset: int) -> None:
        """Uses the tables of a frame found in an unfinished shard, or just written."""
        self.tables = Tables(_logit_codec.CompactCoder(payload, *self._layout), offset)
        self._trained = self._seen

    def resume_rows(self, entries: int) -> None:
        """Counts rows found in an unfinished shard."""
        self._seen += entries

    def train(self, parts: list[RaggedRows]) -> bytes | None:
        """Counts rows about to be written; the payload of new tables where it is time for them."""
        vocab_size = self._layout[0]
        for rows in parts:
            self._id_counts += np.bincount(rows.ids, minlength=vocab_size).astype(np.uint64)
            self._seen += len(rows.ids)
        if self.tables is not None and (
            self._seen < _GROWTH * self._trained or self._trained >= _ENTRIES
        ):
            return None
        rows = RaggedRows.concatenate(parts)
        arrays = (self._id_counts, rows.counts, rows.ids, rows.logprobs)
        return _logit_codec.train(*self._layout, *arrays)

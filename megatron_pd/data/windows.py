"""Documents → windows that a model can take → batches of them.

Axes: B windows of a batch, L their length.

A document is cut into windows of at most the model's sequence length. Consecutive windows overlap,
so that the first tokens of a window have context; each token is kept from exactly one window. The
windows of a batch have similar lengths and are padded on the right, which a causal model ignores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_pd.data.corpus import MegatronCorpus

__all__ = ["Batch", "Windows", "batches_of", "document_groups", "windows_of"]

_LENGTH_MULTIPLE = 64


@dataclass(frozen=True)
class Windows:
    """Tokens [start, start + length) of a document each; a token has one row.

    documents, starts, lengths, keeps: int64 [W] each. Of a window's rows those from the document's
    `keep` on are its own.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    keeps: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, which: slice | np.ndarray) -> Windows:
        return Windows(
            self.documents[which], self.starts[which], self.lengths[which], self.keeps[which]
        )

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the windows' rows, one window after another: the document, the offset in it (int64
        [sum of lengths] each), and whether the row is the window's own (bool)."""
        firsts = np.cumsum(self.lengths) - self.lengths
        offsets = np.arange(self.lengths.sum()) + np.repeat(self.starts - firsts, self.lengths)
        documents, keeps = (np.repeat(x, self.lengths) for x in (self.documents, self.keeps))
        return documents, offsets, offsets >= keeps


class Batch(NamedTuple):
    windows: Windows
    tokens: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], the next token; 0 beyond a window's end

    @property
    def filled(self) -> torch.Tensor:
        """Whether a token is a window's, and no padding: bool [B, L]."""
        return torch.arange(self.tokens.shape[1]) < torch.from_numpy(self.windows.lengths)[:, None]

    @property
    def kept(self) -> torch.Tensor:
        """Whether a token is its window's, and so is its row: bool [B, L]."""
        first = torch.from_numpy(self.windows.keeps - self.windows.starts)[:, None]
        return self.filled & (torch.arange(self.tokens.shape[1]) >= first)


def document_groups(lengths: np.ndarray, tokens: int) -> Iterator[slice]:
    """Consecutive documents, of lengths int64 [documents], in groups of about `tokens` tokens."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + tokens)) + 1
        yield slice(start, min(stop, len(lengths)))
        start = stop


def windows_of(
    documents: np.ndarray, lengths: np.ndarray, sequence_length: int, overlap: int
) -> Windows:
    """Cut documents so that every token but the last, which predicts nothing, is kept once.

    Args:
        documents: int64 [documents], their numbers in the corpus.
        lengths: int64 [documents], their tokens.
        overlap: tokens of context that a window shares with the one before it, in
            [0, sequence_length).
    """
    step = sequence_length - overlap
    predicting = np.maximum(lengths - 1, 0)
    counts = np.maximum(-(-(predicting - sequence_length) // step), 0) + (predicting > 0)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * step
    lengths_left = np.repeat(predicting, counts) - starts
    return Windows(
        np.repeat(documents, counts),
        starts,
        np.minimum(lengths_left, sequence_length),
        np.where(number > 0, starts + overlap, 0),
    )


def batches_of(
    corpus: MegatronCorpus,
    windows: Windows,
    *,
    batch_size: int,
    sequence_length: int,
    length_multiple: int = 1,
) -> Iterator[Batch]:
    """Group windows of similar length; a batch is as long as its longest window needs, and has as
    many windows as fit into the tokens of `batch_size` whole ones.

    Args:
        length_multiple: what the length must divide by (sequence parallelism splits it).
    """
    budget = batch_size * sequence_length
    by_length = windows[np.argsort(-windows.lengths, kind="stable")]
    first = 0
    while first < len(by_length):
        longest = int(by_length.lengths[first])
        length = min(_padded_length(longest, length_multiple), sequence_length)
        chosen = by_length[first : first + max(batch_size, budget // length)]
        first += len(chosen)
        tokens = np.zeros((len(chosen), length + 1), dtype=np.int64)
        tokens[np.arange(length + 1) <= chosen.lengths[:, None]] = corpus.gather(
            chosen.documents, chosen.starts, chosen.lengths + 1
        )
        both = torch.from_numpy(tokens)
        yield Batch(chosen, both[:, :-1], both[:, 1:])


def _padded_length(length: int, multiple: int) -> int:
    """At most a quarter more than `length`, so that lengths are few and little is padding."""
    step = min(_LENGTH_MULTIPLE, 1 << max(0, length.bit_length() - 3))
    step = int(np.lcm(step, multiple))
    return -(-length // step) * step

"""Documents → windows that a model can take → batches of them.

Axes: B windows of a batch, L their length.

A document is cut into windows of at most the model's sequence length. Consecutive windows overlap,
so that the first tokens of a window have context; each token is kept from exactly one window. The
windows of a batch have similar lengths and are padded on the right, which a causal model ignores.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from megatron_pd.data.corpus import MegatronCorpus

__all__ = ["Batch", "Window", "batches_of", "windows_of"]

_LENGTH_MULTIPLE = 64


class Window(NamedTuple):
    """Tokens [start, start + length) of a document; rows from `keep` on are this window's own."""

    document: int
    start: int
    length: int
    keep: int


class Batch(NamedTuple):
    windows: list[Window]
    tokens: torch.Tensor  # int64 [B, L]
    labels: torch.Tensor  # int64 [B, L], the next token; 0 beyond a window's end


def windows_of(document: int, length: int, sequence_length: int, overlap: int) -> list[Window]:
    """Cut a document so that every token but the last, which predicts nothing, is kept once.

    Args:
        length: tokens of the document.
        overlap: tokens of context that a window shares with the one before it, in
            [0, sequence_length).
    """
    windows = []
    start, kept = 0, 0
    while kept < length - 1:
        end = min(start + sequence_length, length - 1)
        windows.append(Window(document, start, end - start, kept))
        kept = end
        start = max(end - overlap, start + 1)
    return windows


def batches_of(
    corpus: MegatronCorpus,
    windows: Sequence[Window],
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
    by_length = sorted(windows, key=lambda window: window.length, reverse=True)
    first = 0
    while first < len(by_length):
        longest = by_length[first].length
        length = min(_padded_length(longest, length_multiple), sequence_length)
        chosen = by_length[first : first + max(batch_size, budget // length)]
        first += len(chosen)
        tokens = np.zeros((len(chosen), length + 1), dtype=np.int64)
        for row, window in zip(tokens, chosen, strict=True):
            row[: window.length + 1] = corpus.tokens(
                window.document, window.start, window.length + 1
            )
        both = torch.from_numpy(tokens)
        yield Batch(chosen, both[:, :-1], both[:, 1:])


def _padded_length(length: int, multiple: int) -> int:
    """At most a quarter more than `length`, so that lengths are few and little is padding."""
    step = min(_LENGTH_MULTIPLE, max(4, 1 << max(0, length.bit_length() - 3)))
    step = int(np.lcm(step, multiple))
    return -(-length // step) * step

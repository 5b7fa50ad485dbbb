"""Logits as the operators take them."""

import math

from torch import Tensor

__all__ = ["as_rows"]


def as_rows(logits: Tensor) -> Tensor:
    """View [..., V] as [S, B, V] with unit last stride; copy only where no such view exists."""
    while logits.dim() < 3:
        logits = logits.unsqueeze(0)
    logits_SBV = logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:])
    # Rows that share memory (an expanded tensor) couldn't hold a gradient each.
    overlaps = any(
        s == 0 and n > 1 for s, n in zip(logits_SBV.stride(), logits_SBV.shape, strict=True)
    )
    return logits_SBV.contiguous() if overlaps or logits_SBV.stride(-1) != 1 else logits_SBV

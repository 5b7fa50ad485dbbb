"""What tail policies and losses work on: teacher rows with the student's values, and outcomes.

Axes: T any leading shape (tokens), K columns of a teacher row, M outcomes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Outcomes", "Parts", "Rows", "log_sum", "masked_sum", "normalised"]

# A teacher's tail below this is the rounding of its float32 log-probabilities, whose LSE of about
# 20 has an ulp of 2e-6. Left in, τ = 2 would make a bucket of 1e-6 one of 1e-3.
_ROUNDING = 1e-5


class Outcomes(NamedTuple):
    """Two measures on the same outcomes."""

    log_t: Tensor
    """[T, M], the teacher's log-measure; no gradient."""

    log_q: Tensor
    """[T, M], the student's."""

    mask: Tensor
    """bool [T, M]: whether the outcome is one. Elsewhere log_t and log_q are both 0 and constant:
    measures that agree, where every divergence is 0."""


Parts = tuple[Outcomes, ...]
"""Outcomes in one or two tensors: those of the row [T, K] and perhaps one more [T, 1]."""


@dataclass(frozen=True)
class Rows:
    """One batch of teacher rows with the student's values, every row at least one entry long."""

    ids: Tensor
    """int [T, K]; −1 in padding."""

    mask: Tensor
    """bool [T, K], where a column holds an entry."""

    log_t: Tensor
    """[T, K], the teacher's full-vocabulary log-probabilities at τ = 1; 0 in padding."""

    tempered_log_t: Tensor
    """[T, K], log_t / τ."""

    tau: Tensor
    """[T, 1], the teacher's temperature of each row."""

    log_q: Tensor
    """[T, K], the student's full-vocabulary log-probabilities at τ_s = 1; 0 in padding."""

    tempered_log_q: Tensor
    """[T, K], the same at τ_s for a tail policy that tempers the vocabulary, else log_q."""

    student_tau: float
    """τ_s."""

    labels: Tensor
    """int [T], the ground-truth tokens."""

    label_log_q: Tensor
    """[T], the student's log-probability of the label at τ_s = 1."""

    tempered_label_log_q: Tensor
    """[T], the same where `tempered_log_q` is at τ_s, else label_log_q."""

    @functools.cached_property
    def log_mass(self) -> Tensor:
        """[T, 1], log a of the teacher's kept mass."""
        return log_sum(self.log_t, self.mask)

    @functools.cached_property
    def tempered_log_mass(self) -> Tensor:
        """[T, 1], log Σ t^(1/τ)."""
        if self.tempered_log_t is self.log_t:
            return self.log_mass
        return log_sum(self.tempered_log_t, self.mask)

    @functools.cached_property
    def log_tail(self) -> Tensor:
        """[T, 1], log(1 − a); −inf where the rest is no more than rounding."""
        tail = -torch.expm1(self.log_mass)
        return tail.masked_fill(tail <= _ROUNDING, 0.0).log()

    @property
    def log_conditional(self) -> Tensor:
        """[T, K], the teacher's log-distribution at τ given the row."""
        return normalised(self.tempered_log_t, self.tempered_log_mass, self.mask)


def masked_sum(terms: Tensor, mask: Tensor) -> Tensor:
    """[T, 1]."""
    return torch.where(mask, terms, 0.0).sum(-1, keepdim=True)


def log_sum(log_x: Tensor, mask: Tensor) -> Tensor:
    """[T, 1]; every row of `mask` has a true column, so the result is finite."""
    return log_x.masked_fill(~mask, -math.inf).logsumexp(-1, keepdim=True)


def normalised(log_x: Tensor, log_total: Tensor, mask: Tensor) -> Tensor:
    """log(x / total) in the masked columns; 0 in the others."""
    return torch.where(mask, log_x - log_total, 0.0)

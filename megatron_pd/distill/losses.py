"""The divergences between the teacher's and the student's measure: --pd-loss.

A loss is a sum over the outcomes that the tail policy defines. The measures need not sum to 1, so
reverse KL is taken in its generalised form, Σ q·log(q/t) − q + t, which is least at q = t whatever
the masses. docs/losses.md has the table that is made from `LOSSES`.

Axes: T any leading shape (tokens), M outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_pd.distill.rows import Outcomes, Parts, Rows, masked_sum
from megatron_pd.registry import Registry

if TYPE_CHECKING:
    from megatron_pd.distill.config import PDConfig

__all__ = ["LOSSES", "Loss", "sum_of", "total"]


@dataclass(frozen=True)
class Loss:
    """A choice of --pd-loss."""

    value: Callable[[Rows, Parts, PDConfig], Tensor]
    """[T], the loss of each row, differentiable in the student's values; `sum_of` makes it from the
    term of one outcome."""

    formula: str
    """For the help and the docs, t and q the teacher's and the student's measures."""

    linear_in_teacher: bool = False
    """Whether it is linear in the teacher's measure, so that random draws give its gradient without
    bias."""

    uses_tail: bool = True
    """Whether it looks at the outcomes of the tail policy, and not at the row alone."""

    uses_beta: bool = False
    """Whether it reads --pd-jsd-beta."""


def sum_of(terms: Callable[[Outcomes], Tensor]) -> Callable[[Rows, Parts, PDConfig], Tensor]:
    """The loss whose terms [T, M], 0 where the two measures agree, add up over the outcomes."""

    def value(rows: Rows, parts: Parts, config: PDConfig) -> Tensor:
        return total(terms, parts)

    return value


def total(terms: Callable[[Outcomes], Tensor], parts: Parts) -> Tensor:
    """[T], the sum of `terms`, [T, M] each, over all outcomes."""
    first, *others = (terms(part).sum(-1) for part in parts)
    return sum(others, first)


def _nll(outcomes: Outcomes) -> Tensor:
    """Soft cross entropy, −t·log q."""
    return -outcomes.log_t.exp() * outcomes.log_q


def _kld(outcomes: Outcomes) -> Tensor:
    """Forward KL, t·log(t/q)."""
    return outcomes.log_t.exp() * (outcomes.log_t - outcomes.log_q)


def _reverse_kld(outcomes: Outcomes) -> Tensor:
    """Generalised reverse KL, q·log(q/t) − q + t: off the outcomes, where the teacher's mass is
    taken as unknown, nothing is charged."""
    t, q = outcomes.log_t.exp(), outcomes.log_q.exp()
    return q * (outcomes.log_q - outcomes.log_t) - q + t


def _mse_prob(outcomes: Outcomes) -> Tensor:
    """Squared error of the probabilities."""
    return (outcomes.log_t.exp() - outcomes.log_q.exp()).square()


def _jsd(rows: Rows, parts: Parts, config: PDConfig) -> Tensor:
    """β·KL(t ‖ m) + (1 − β)·KL(q ‖ m) with m = β·t + (1 − β)·q, over the whole vocabulary: off the
    outcomes t is 0 and each unit of the student's mass costs −(1 − β)·log(1 − β)."""
    beta = config.jsd_beta
    assert beta is not None
    unit_cost = -(1 - beta) * math.log1p(-beta)

    def terms(outcomes: Outcomes) -> Tensor:
        log_t, log_q, mask = outcomes
        log_m = torch.logaddexp(log_t + math.log(beta), log_q + math.log1p(-beta))
        t, q = log_t.exp(), log_q.exp()
        on = beta * t * (log_t - log_m) + (1 - beta) * q * (log_q - log_m)
        return torch.where(mask, on - unit_cost * q, 0.0)

    return unit_cost + total(terms, parts)


def _centred_logit_error(rows: Rows, parts: Parts, config: PDConfig) -> Tensor:
    """Mean over the row of the squared difference of the two sides' logits, each divided by its
    temperature and centred on its own mean: log-probabilities are logits up to that mean."""
    length = rows.mask.sum(-1, keepdim=True)
    gap = torch.where(rows.mask, rows.tempered_log_t - rows.log_q / rows.student_tau, 0.0)
    centred = gap - gap.sum(-1, keepdim=True) / length
    return (masked_sum(centred.square(), rows.mask) / length).squeeze(-1)


LOSSES: Registry[Loss] = Registry("loss", Loss)
LOSSES.add("nll", Loss(sum_of(_nll), "−Σ t·log q", linear_in_teacher=True))
LOSSES.add("kld", Loss(sum_of(_kld), "Σ t·log(t/q)", linear_in_teacher=True))
LOSSES.add("reverse-kld", Loss(sum_of(_reverse_kld), "Σ q·log(q/t) − q + t"))
LOSSES.add(
    "jsd",
    Loss(
        _jsd,
        "β·KL(t ‖ m) + (1 − β)·KL(q ‖ m) over the whole vocabulary, m = β·t + (1 − β)·q, β of "
        "`--pd-jsd-beta`",
        uses_beta=True,
    ),
)
LOSSES.add("mse-prob", Loss(sum_of(_mse_prob), "Σ (t − q)²"))
LOSSES.add(
    "mse-logit",
    Loss(
        _centred_logit_error,
        "mean over K of (centred ℓ/τ − centred student logits)²",
        uses_tail=False,
    ),
)

"""What becomes of the teacher's mass outside its row: --pd-tail.

A tail policy turns a row and the student's log-probabilities at its ids into two measures on the
same few outcomes: the kept tokens, and for some policies one more (the whole tail, or the label).
docs/losses.md has the table that is made from `TAILS`.

Axes: T any leading shape (tokens), K columns of a teacher row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_pd.distill.rows import Outcomes, Parts, Rows, log_sum, masked_sum, normalised
from megatron_pd.registry import Registry

__all__ = ["TAILS", "TailPolicy"]


@dataclass(frozen=True)
class TailPolicy:
    """A choice of --pd-tail."""

    outcomes: Callable[[Rows], Parts]
    """The two measures: those of the row [T, K], and perhaps of one outcome more [T, 1]."""

    target: str
    """What the student is drawn to, for the help and the docs."""

    gradient: str
    """Of `kld` with respect to the student's logits at τ = 1, p the student's softmax."""

    bias: str
    """What the target is biased towards."""

    tempers_vocabulary: bool = False
    """Whether it reads `Rows.tempered_log_q`, so that --pd-student-temperature asks for a second
    log-softmax over the vocabulary; else it tempers within the row."""

    of_draws: bool = False
    """Whether it takes rows of random draws, which neither truncation nor temperature may touch,
    instead of rows of the top tokens."""


def _renormalize(rows: Rows) -> Parts:
    """Eq. 4: t = softmax(ℓ/τ) on the row, 0 off it. Gradient p − t."""
    return (Outcomes(rows.log_conditional, rows.tempered_log_q, rows.mask),)


def _raw(rows: Rows) -> Parts:
    """The row tempered within its own mass a. Gradient a·p − t."""
    return (Outcomes(_log_t_of_mass(rows), rows.tempered_log_q, rows.mask),)


def _sampled(rows: Rows) -> Parts:
    """The row's weights as they are, shares of random draws. Gradient (Σt)·p − t."""
    return (Outcomes(rows.log_t, rows.log_q, rows.mask),)


def _to_label(rows: Rows) -> Parts:
    """`raw`, and the tail's mass on the label, in its column or in one more."""
    log_t = _log_t_of_mass(rows)
    is_label = (rows.ids == rows.labels.unsqueeze(-1)) & rows.mask
    log_t = torch.where(is_label, torch.logaddexp(log_t, rows.log_tail), log_t)
    extra = ~is_label.any(-1, keepdim=True) & torch.isfinite(rows.log_tail)
    label_log_q = rows.tempered_label_log_q.unsqueeze(-1)
    row = Outcomes(log_t, rows.tempered_log_q, rows.mask)
    return row, _one_outcome(rows.log_tail, label_log_q, extra)


def _ghost(rows: Rows) -> Parts:
    """The row and one bucket for all other tokens, on both sides: a vocabulary of K + 1, tempered
    as such. Gradient at τ = 1: p − t on the row, p·(a − P)/(1 − P) off it, P the student's mass
    on the row."""
    log_bucket = rows.log_tail / rows.tau
    log_total = torch.logaddexp(rows.tempered_log_mass, log_bucket)
    log_t = normalised(rows.tempered_log_t, log_total, rows.mask)
    log_q = rows.log_q
    log_rest = _log_complement(masked_sum(log_q.exp(), rows.mask))
    if rows.student_tau != 1.0:
        log_q, log_rest = log_q / rows.student_tau, log_rest / rows.student_tau
        log_student_total = torch.logaddexp(log_sum(log_q, rows.mask), log_rest)
        log_q = normalised(log_q, log_student_total, rows.mask)
        log_rest = log_rest - log_student_total
    bucket = _one_outcome(log_bucket - log_total, log_rest, torch.isfinite(log_bucket))
    return Outcomes(log_t, log_q, rows.mask), bucket


def _decoupled(rows: Rows) -> Parts:
    """Masses of row and rest at τ = 1, as `ghost`; within the row, each side at its temperature.

    KL of these K + 1 outcomes is KL(a ‖ P) of the two masses plus a · KL of the tempered
    conditional distributions (LFM2, arXiv 2511.23404).
    """
    log_student_mass = log_sum(rows.log_q, rows.mask)
    log_q = rows.log_q / rows.student_tau
    log_q = normalised(log_q, log_sum(log_q, rows.mask) - log_student_mass, rows.mask)
    log_rest = _log_complement(log_student_mass.exp())
    row = Outcomes(_log_t_of_mass(rows), log_q, rows.mask)
    return row, _one_outcome(rows.log_tail, log_rest, torch.isfinite(rows.log_tail))


def _log_t_of_mass(rows: Rows) -> Tensor:
    """[T, K], the row at τ with the mass that it has at 1."""
    return normalised(rows.tempered_log_t, rows.tempered_log_mass - rows.log_mass, rows.mask)


def _one_outcome(log_t: Tensor, log_q: Tensor, mask: Tensor) -> Outcomes:
    """One outcome a row, [T, 1] each, where `mask` says that there is one."""
    return Outcomes(torch.where(mask, log_t, 0.0), torch.where(mask, log_q, 0.0), mask)


def _log_complement(mass: Tensor) -> Tensor:
    """log(1 − mass) for the student, with a gradient also where rounding has left nothing.

    Below the floor the value is the floor's and the slope that of a line through it, so that a
    student that puts all its mass on the row is still pushed off it.
    """
    rest = 1.0 - mass
    floored = rest.detach().clamp(min=8 * torch.finfo(rest.dtype).eps)
    return floored.log() + (rest - rest.detach()) / floored


TAILS: Registry[TailPolicy] = Registry("tail policy", TailPolicy)
TAILS.add(
    "renormalize",
    TailPolicy(
        _renormalize,
        target="softmax(ℓ/τ) on K, 0 off it (Eq. 4)",
        gradient="p − t/a on K, p off it",
        bias="the head: every kept token is inflated by 1/a and the tail is pushed to 0",
        tempers_vocabulary=True,
    ),
)
TAILS.add(
    "raw",
    TailPolicy(
        _raw,
        target="a · softmax(ℓ/τ) on K",
        gradient="a·p − t on K, a·p off it",
        bias="the same minimum as `renormalize`; rows weigh by their mass",
        tempers_vocabulary=True,
    ),
)
TAILS.add(
    "ghost",
    TailPolicy(
        _ghost,
        target="K and one bucket of mass 1 − a, on both sides",
        gradient="p − t on K, p·(a − P)/(1 − P) off it",
        bias="nothing in the masses; within the tail the student keeps its own proportions",
    ),
)
TAILS.add(
    "to-label",
    TailPolicy(
        _to_label,
        target="`raw`, and 1 − a to the ground-truth token",
        gradient="p − t, t with the tail on the label",
        bias="the head, mildly: where labels follow the teacher the mean target is (2 − a)·t on K "
        "and (1 − a)·t off it",
        tempers_vocabulary=True,
    ),
)
TAILS.add(
    "decoupled",
    TailPolicy(
        _decoupled,
        target="masses a, 1 − a at τ = 1; softmax(ℓ/τ) within K",
        gradient="at τ = 1 that of `ghost`",
        bias="as `ghost`, with the head alone softened by τ",
    ),
)
TAILS.add(
    "sampled",
    TailPolicy(
        _sampled,
        target="shares of N random draws (a store of `megatron-pd dump --dump-sampled N`)",
        gradient="p − t on average over the draws",
        bias="nothing: unbiased, with the draws' noise",
        of_draws=True,
    ),
)

"""Distillation losses on sparse log-probabilities: small differentiable functions, no vocabulary.

Axes: T any leading shape (tokens), K columns of a teacher row, M outcomes.

1. The tail policy turns a row and the student's log-probabilities at its ids into two measures on
   the same few outcomes: the kept tokens, and for some policies one more (the whole tail, or the
   label). `Outcomes` holds them; docs/losses.md has each policy's formula, gradient and bias.
2. The loss is a divergence of the two measures, a sum over the outcomes. They need not sum to 1, so
   reverse KL is taken in its generalised form, Σ q·log(q/t) − q + t, which is least at q = t
   whatever the masses.

The student's values are full-vocabulary log-probabilities, so gradients reach every logit through
their own backward: with g = ∂L/∂logq it adds g at the ids and −(Σg)·p everywhere. Temperatures are
the teacher's τ (after truncation, Eq. 4 of arXiv 2410.16215) and the student's τ_s.

Precision: everything in the dtype of the student's log-probabilities (float32, or float64 in
tests). Masked columns are filled before anything that could make them NaN, and nothing is clamped
in a way that stops a gradient.

Cost: beside one read and write of the logits, a small operation on [T, K] is nearly all launch, so
their number counts. `row_divergence` does all of them in one for a student at temperature 1, the
paper's; what PyTorch composes here serves every other setting, and defines what that operator is
tested against. To keep it short padding is filled such that the losses need no mask, and the extra
outcome stands in [T, 1] tensors instead of a column K + 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.targets import TeacherTargets, row_mask, truncate
from megatron_pd.errors import UserError
from megatron_pd.ops import row_divergence

__all__ = ["composed_loss", "distillation_loss", "mix", "row_temperature"]

# A teacher's tail below this is the rounding of its float32 log-probabilities, whose LSE of about
# 20 has an ulp of 2e-6. Left in, τ = 2 would make a bucket of 1e-6 one of 1e-3.
_TEACHER_ROUNDING = 1e-5


class Outcomes(NamedTuple):
    """Two measures on the same outcomes."""

    log_t: Tensor
    """[T, M], the teacher's log-measure; no gradient."""

    log_q: Tensor
    """[T, M], the student's."""

    mask: Tensor
    """bool [T, M]: whether the outcome is one. Elsewhere log_t and log_q are both 0 and constant:
    measures that agree, where every divergence is 0."""


@dataclass(frozen=True)
class _Rows:
    """One batch of teacher rows with the student's values, every row at least one entry long."""

    ids: Tensor  # [T, K]
    mask: Tensor  # [T, K]
    log_t: Tensor  # [T, K], full vocabulary, τ = 1
    tempered_log_t: Tensor  # [T, K], log_t / τ
    tau: Tensor  # [T, 1]
    log_q: Tensor  # [T, K], full vocabulary, τ_s = 1
    tempered_log_q: Tensor  # [T, K], full vocabulary, at τ_s
    student_tau: float
    labels: Tensor  # [T]
    label_log_q: Tensor  # [T], at τ_s = 1

    @functools.cached_property
    def log_mass(self) -> Tensor:
        """[T, 1], log a of the teacher's kept mass."""
        return _log_sum(self.log_t, self.mask)

    @functools.cached_property
    def tempered_log_mass(self) -> Tensor:
        """[T, 1], log Σ t^(1/τ)."""
        if self.tempered_log_t is self.log_t:
            return self.log_mass
        return _log_sum(self.tempered_log_t, self.mask)

    @functools.cached_property
    def log_tail(self) -> Tensor:
        """[T, 1], log(1 − a); −inf where the rest is no more than rounding."""
        tail = -torch.expm1(self.log_mass)
        return tail.masked_fill(tail <= _TEACHER_ROUNDING, 0.0).log()

    @property
    def log_conditional(self) -> Tensor:
        """[T, K], the teacher's log-distribution at τ given the row."""
        return _normalised(self.tempered_log_t, self.tempered_log_mass, self.mask)


def distillation_loss(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None = None,
) -> Tensor:
    """Loss of each token against its teacher row.

    Args:
        config: loss, tail policy, temperatures and further truncation.
        teacher: rows [T, K].
        logq_TK: float32 or float64, the student's full-vocabulary log-probabilities at the
            teacher's ids; 0 in padding.
        label_logq_T: the same at the labels.
        labels_T: integer ids of the next tokens.
        tempered_logq_TK: `logq_TK` at `config.student_temperature`; needed exactly where
            `config.needs_tempered_student`.

    Returns:
        [T] in the dtype of `logq_TK`, in nats; exactly 0 with exactly 0 gradient where a row has
        no entry.

    Raises:
        ValueError: `tempered_logq_TK` is missing.
        UserError: the store has no statistic that the adaptive temperature needs.
    """
    if config.needs_tempered_student and tempered_logq_TK is None:
        raise ValueError(
            f"--pd-tail {config.tail} with --pd-student-temperature {config.student_temperature} "
            "needs the student's log-probabilities at that temperature as well; call "
            "sparse_log_softmax again with temperature= and pass tempered_logq_TK."
        )
    if config.top_p is not None or config.top_k is not None:
        teacher = truncate(teacher, config.top_p, config.top_k)
    if config.student_temperature == 1.0 and config.loss != "mse-logit":
        return row_divergence(
            logq_TK[..., : teacher.ids.shape[-1]],
            label_logq_T,
            teacher.ids,
            teacher.logprobs.to(logq_TK.dtype),
            teacher.counts,
            labels_T,
            row_temperature(config, teacher).to(logq_TK.dtype),
            tail=config.tail,
            loss=config.loss,
            weight=_weight_name(config),
            jsd_beta=config.jsd_beta or 0.5,
        )
    return composed_loss(config, teacher, logq_TK, label_logq_T, labels_T, tempered_logq_TK)


def composed_loss(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None = None,
) -> Tensor:
    """`distillation_loss` from PyTorch operations, for every option; rows are truncated already.

    This is the definition that the operator `row_divergence` is held to, and the place to add a
    loss or a tail policy.
    """
    rows = _rows(config, teacher, logq_TK, label_logq_T, labels_T, tempered_logq_TK)
    if config.loss == "mse-logit":
        loss_T = _centred_logit_error(rows)
    else:
        loss_T = _divergence(config, _TAILS[config.tail](rows))
    match _weight_name(config):
        case "tau-squared":
            loss_T = loss_T * rows.tau.square().squeeze(-1)
        case "tempered-mass":
            loss_T = loss_T * rows.tempered_log_mass.exp().squeeze(-1)
    return torch.where(teacher.counts > 0, loss_T, 0.0)


def mix(alpha: float, lm_T: Tensor, kd_T: Tensor, counts_T: Tensor) -> Tensor:
    """Eq. 1, (1 − α)·L_lm + α·L_kd; a token without a teacher (count 0) has the LM loss alone."""
    return torch.where(counts_T > 0, torch.lerp(lm_T, kd_T, alpha), lm_T)


# ------------------------------------------------------------------------------ rows


def _rows(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None,
) -> _Rows:
    """Bring everything to one width and dtype; an empty row becomes one of a single token.

    Such a row is finite under every formula, and `distillation_loss` drops its value.
    """
    columns = teacher.ids.shape[-1]
    mask_TK = row_mask(teacher.counts.clamp(min=1), columns)

    def widened(rows_TK: Tensor, value: float = 0) -> Tensor:
        return functional.pad(rows_TK, (0, 1), value=value) if columns == 0 else rows_TK

    def student(logq_TK: Tensor) -> Tensor:
        return widened(torch.where(mask_TK, logq_TK[..., :columns], 0.0))

    log_q = student(logq_TK)
    log_t = widened(teacher.logprobs.to(log_q.dtype))
    tau = row_temperature(config, teacher).to(log_q.dtype)
    as_stored = config.temperature == 1.0 and config.adaptive_temperature is None
    return _Rows(
        ids=widened(teacher.ids, -1),
        mask=widened(mask_TK, True),
        log_t=log_t,
        tempered_log_t=log_t if as_stored else log_t / tau,
        tau=tau,
        log_q=log_q,
        tempered_log_q=log_q if tempered_logq_TK is None else student(tempered_logq_TK),
        student_tau=config.student_temperature,
        labels=labels_T,
        label_log_q=label_logq_T,
    )


def row_temperature(config: PDConfig, teacher: TeacherTargets) -> Tensor:
    """The teacher's temperature of each row, float32 [T, 1].

    The paper reports adaptive temperatures (Table 3) without its own formulas. Here, with c for
    `--pd-temperature` and the result of all but wttm held in [`--pd-adaptive-min`, `-max`]:

    - normkd: c · std of the teacher's logits (NormKD, arXiv 2308.00520), and the loss is multiplied
      by τ². That paper tempers the student by its own std too; the student here keeps
      `--pd-student-temperature`, as in this paper's Eq. 3 and 4.
    - wttm: c everywhere, and the loss is multiplied by U = Σ t^(1/c) over the row (WTTM, arXiv
      2402.11148, whose β is α / (1 − α) here).
    - adakd-sd, adakd-h: c + slope · std, and c + slope · entropy in nats. The formula is ours: only
      the statistics are known from the paper, by the methods' names.
    """
    constant = config.temperature
    match config.adaptive_temperature:
        case None | "wttm":
            return torch.full_like(teacher.counts, constant, dtype=torch.float32).unsqueeze(-1)
        case "normkd":
            tau_T = constant * _statistic(teacher.std, "standard deviation", config)
        case "adakd-sd":
            tau_T = constant + _slope(config) * _statistic(
                teacher.std, "standard deviation", config
            )
        case _:
            tau_T = constant + _slope(config) * _statistic(teacher.entropy, "entropy", config)
    return tau_T.float().clamp(config.adaptive_min, config.adaptive_max).unsqueeze(-1)


def _slope(config: PDConfig) -> float:
    assert config.adaptive_slope is not None
    return config.adaptive_slope


def _statistic(statistic_T: Tensor | None, name: str, config: PDConfig) -> Tensor:
    if statistic_T is None:
        raise UserError(
            f"--pd-adaptive-temperature {config.adaptive_temperature} needs the {name} of the "
            "teacher's distribution for each row, and the logit store has none. Dump the teacher "
            "again with its row statistics, or choose another temperature."
        )
    return statistic_T


def _weight_name(config: PDConfig) -> str:
    """What a row's loss and gradient are multiplied by, as `row_divergence` names it."""
    if config.adaptive_temperature == "wttm":
        return "tempered-mass"
    return "tau-squared" if config.tau_squared or config.adaptive_temperature == "normkd" else "one"


# ------------------------------------------------------------------------------ tail policies


Parts = tuple[Outcomes, ...]
"""Outcomes in one or two tensors: those of the row [T, K] and one more [T, 1]."""


def _renormalize(rows: _Rows) -> Parts:
    """Eq. 4: t = softmax(ℓ/τ) on the row, 0 off it. Gradient p − t."""
    return (Outcomes(rows.log_conditional, rows.tempered_log_q, rows.mask),)


def _raw(rows: _Rows) -> Parts:
    """The row tempered within its own mass a. Gradient a·p − t."""
    return (Outcomes(_log_t_of_mass(rows), rows.tempered_log_q, rows.mask),)


def _sampled(rows: _Rows) -> Parts:
    """The row's weights as they are, shares of random draws. Gradient (Σt)·p − t."""
    return (Outcomes(rows.log_t, rows.log_q, rows.mask),)


def _to_label(rows: _Rows) -> Parts:
    """`raw`, and the tail's mass on the label, in its column or in one more."""
    log_t = _log_t_of_mass(rows)
    is_label = (rows.ids == rows.labels.unsqueeze(-1)) & rows.mask
    log_t = torch.where(is_label, torch.logaddexp(log_t, rows.log_tail), log_t)
    extra = ~is_label.any(-1, keepdim=True) & torch.isfinite(rows.log_tail)
    label_log_q = rows.label_log_q.unsqueeze(-1)
    if rows.student_tau != 1.0:
        # log q at τ_s is log q/τ_s plus one constant per row, which any kept column tells.
        shift = (rows.tempered_log_q - rows.log_q / rows.student_tau)[..., :1]
        label_log_q = label_log_q / rows.student_tau + shift
    row = Outcomes(log_t, rows.tempered_log_q, rows.mask)
    return row, _one_outcome(rows.log_tail, label_log_q, extra)


def _ghost(rows: _Rows) -> Parts:
    """The row and one bucket for all other tokens, on both sides: a vocabulary of K + 1, tempered
    as such. Gradient at τ = 1: p − t on the row, p·(a − P)/(1 − P) off it, P the student's mass
    on the row."""
    log_bucket = rows.log_tail / rows.tau
    log_total = torch.logaddexp(rows.tempered_log_mass, log_bucket)
    log_t = _normalised(rows.tempered_log_t, log_total, rows.mask)
    log_q = rows.log_q
    log_rest = _log_complement(_sum(log_q.exp(), rows.mask))
    if rows.student_tau != 1.0:
        log_q, log_rest = log_q / rows.student_tau, log_rest / rows.student_tau
        log_student_total = torch.logaddexp(_log_sum(log_q, rows.mask), log_rest)
        log_q = _normalised(log_q, log_student_total, rows.mask)
        log_rest = log_rest - log_student_total
    bucket = _one_outcome(log_bucket - log_total, log_rest, torch.isfinite(log_bucket))
    return Outcomes(log_t, log_q, rows.mask), bucket


def _decoupled(rows: _Rows) -> Parts:
    """Masses of row and rest at τ = 1, as `ghost`; within the row, each side at its temperature.

    KL of these K + 1 outcomes is KL(a ‖ P) of the two masses plus a · KL of the tempered
    conditional distributions (LFM2, arXiv 2511.23404).
    """
    log_student_mass = _log_sum(rows.log_q, rows.mask)
    log_q = rows.log_q / rows.student_tau
    log_q = _normalised(log_q, _log_sum(log_q, rows.mask) - log_student_mass, rows.mask)
    log_rest = _log_complement(log_student_mass.exp())
    row = Outcomes(_log_t_of_mass(rows), log_q, rows.mask)
    return row, _one_outcome(rows.log_tail, log_rest, torch.isfinite(rows.log_tail))


_TAILS: dict[str, Callable[[_Rows], Parts]] = {
    "renormalize": _renormalize,
    "raw": _raw,
    "ghost": _ghost,
    "to-label": _to_label,
    "decoupled": _decoupled,
    "sampled": _sampled,
}


def _log_t_of_mass(rows: _Rows) -> Tensor:
    """[T, K], the row at τ with the mass that it has at 1."""
    return _normalised(rows.tempered_log_t, rows.tempered_log_mass - rows.log_mass, rows.mask)


def _one_outcome(log_t: Tensor, log_q: Tensor, mask: Tensor) -> Outcomes:
    """One outcome a row, [T, 1] each, where `mask` says that there is one."""
    return Outcomes(torch.where(mask, log_t, 0.0), torch.where(mask, log_q, 0.0), mask)


# ------------------------------------------------------------------------------ losses


def _divergence(config: PDConfig, parts: Parts) -> Tensor:
    """[T], `config.loss` of the two measures."""
    if config.loss == "jsd":
        assert config.jsd_beta is not None
        return _jsd(parts, config.jsd_beta)
    return _total(_TERMS[config.loss], parts)


def _total(terms: Callable[[Outcomes], Tensor], parts: Parts) -> Tensor:
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


_TERMS: dict[str, Callable[[Outcomes], Tensor]] = {
    "nll": _nll,
    "kld": _kld,
    "reverse-kld": _reverse_kld,
    "mse-prob": _mse_prob,
}


def _jsd(parts: Parts, beta: float) -> Tensor:
    """β·KL(t ‖ m) + (1 − β)·KL(q ‖ m) with m = β·t + (1 − β)·q, over the whole vocabulary: off the
    outcomes t is 0 and each unit of the student's mass costs −(1 − β)·log(1 − β)."""
    unit_cost = -(1 - beta) * math.log1p(-beta)

    def terms(outcomes: Outcomes) -> Tensor:
        log_t, log_q, mask = outcomes
        log_m = torch.logaddexp(log_t + math.log(beta), log_q + math.log1p(-beta))
        t, q = log_t.exp(), log_q.exp()
        on = beta * t * (log_t - log_m) + (1 - beta) * q * (log_q - log_m)
        return torch.where(mask, on - unit_cost * q, 0.0)

    return unit_cost + _total(terms, parts)


def _centred_logit_error(rows: _Rows) -> Tensor:
    """Mean over the row of the squared difference of the two sides' logits, each divided by its
    temperature and centred on its own mean: log-probabilities are logits up to that mean."""
    length = rows.mask.sum(-1, keepdim=True)
    gap = torch.where(rows.mask, rows.tempered_log_t - rows.log_q / rows.student_tau, 0.0)
    centred = gap - gap.sum(-1, keepdim=True) / length
    return (_sum(centred.square(), rows.mask) / length).squeeze(-1)


# ------------------------------------------------------------------------------ numerics


def _sum(terms: Tensor, mask: Tensor) -> Tensor:
    """[T, 1]."""
    return torch.where(mask, terms, 0.0).sum(-1, keepdim=True)


def _log_sum(log_x: Tensor, mask: Tensor) -> Tensor:
    """[T, 1]; every row of `mask` has a true column, so the result is finite."""
    return log_x.masked_fill(~mask, -math.inf).logsumexp(-1, keepdim=True)


def _normalised(log_x: Tensor, log_total: Tensor, mask: Tensor) -> Tensor:
    """log(x / total) in the masked columns; 0 in the others."""
    return torch.where(mask, log_x - log_total, 0.0)


def _log_complement(mass: Tensor) -> Tensor:
    """log(1 − mass) for the student, with a gradient also where rounding has left nothing.

    Below the floor the value is the floor's and the slope that of a line through it, so that a
    student that puts all its mass on the row is still pushed off it.
    """
    rest = 1.0 - mass
    floored = rest.detach().clamp(min=8 * torch.finfo(rest.dtype).eps)
    return floored.log() + (rest - rest.detach()) / floored

"""The distillation loss of every token, and its mixture with the LM loss.

Axes: T any leading shape (tokens), K columns of a teacher row.

1. The tail policy (`tails.py`) turns a row and the student's log-probabilities at its ids into two
   measures on the same few outcomes.
2. The loss (`losses.py`) is a divergence of the two measures.

The student's values are full-vocabulary log-probabilities, so gradients reach every logit through
their own backward: with g = ∂L/∂logq it adds g at the ids and −(Σg)·p everywhere. Temperatures are
the teacher's τ (after truncation, Eq. 4 of arXiv 2410.16215) and the student's τ_s.

Precision: everything in the dtype of the student's log-probabilities (float32, or float64 in
tests). Masked columns are filled before anything that could make them NaN, and nothing is clamped
in a way that stops a gradient.

Cost: beside one read and write of the logits, a small operation on [T, K] is nearly all launch, so
their number counts. `row_divergence` does all of them in one for the losses and policies that it
knows and a student at temperature 1, the paper's, or tempered over the vocabulary; what PyTorch
composes here serves every other setting, and defines what that operator is tested against. To keep
it short padding is filled such that the losses need no mask, and the extra outcome stands in [T, 1]
tensors instead of a column K + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.losses import LOSSES
from megatron_pd.distill.rows import Rows
from megatron_pd.distill.tails import TAILS
from megatron_pd.distill.targets import TeacherTargets, row_mask, truncate
from megatron_pd.distill.temperatures import row_temperature
from megatron_pd.ops import is_fused, row_divergence

__all__ = ["composed_loss", "distillation_loss", "mix", "mix_gradient"]


def distillation_loss(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None = None,
    tempered_label_logq_T: Tensor | None = None,
) -> Tensor:
    """Loss of each token against its teacher row.

    Args:
        config: loss, tail policy, temperatures and further truncation.
        teacher: rows [T, K].
        logq_TK: float32 or float64, the student's full-vocabulary log-probabilities at the
            teacher's ids; 0 in padding.
        label_logq_T: the same at the labels.
        labels_T: integer ids of the next tokens.
        tempered_logq_TK, tempered_label_logq_T: `logq_TK` and `label_logq_T` at
            `config.student_temperature`; needed exactly where `config.needs_tempered_student`.

    Returns:
        [T] in the dtype of `logq_TK`, in nats; exactly 0 with exactly 0 gradient where a row has
        no entry.

    Raises:
        ValueError: they are missing.
        UserError: the store has no statistic that the adaptive temperature needs.
    """
    tempers = config.needs_tempered_student
    if tempers and (tempered_logq_TK is None or tempered_label_logq_T is None):
        raise ValueError(
            f"--pd-tail {config.tail} with --pd-student-temperature {config.student_temperature} "
            "needs the student's log-probabilities at that temperature as well: take them from "
            "sparse_log_softmaxes and pass tempered_logq_TK and tempered_label_logq_T."
        )
    if config.top_p is not None or config.top_k is not None:
        teacher = truncate(teacher, config.top_p, config.top_k)
    if (tempers or config.student_temperature == 1.0) and is_fused(config.loss, config.tail):
        # Such a policy looks at the student at the one temperature alone.
        student_TK, label_T = (
            (tempered_logq_TK, tempered_label_logq_T) if tempers else (logq_TK, label_logq_T)
        )
        assert student_TK is not None and label_T is not None
        return row_divergence(
            student_TK[..., : teacher.ids.shape[-1]],
            label_T,
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
    student = logq_TK, label_logq_T, labels_T, tempered_logq_TK, tempered_label_logq_T
    return composed_loss(config, teacher, *student)


def composed_loss(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None = None,
    tempered_label_logq_T: Tensor | None = None,
) -> Tensor:
    """`distillation_loss` from PyTorch operations, for every option; rows are truncated already.

    This is the definition that the operator `row_divergence` is held to.

    Raises:
        ValueError: the loss, perhaps one from outside, gives something else than a number a row.
    """
    student = logq_TK, label_logq_T, labels_T, tempered_logq_TK, tempered_label_logq_T
    rows = _rows(config, teacher, *student)
    loss = LOSSES.get(config.loss)
    parts = TAILS.get(config.tail).outcomes(rows) if loss.uses_tail else ()
    loss_T = loss.value(rows, parts, config)
    if loss_T.shape != teacher.counts.shape:
        raise ValueError(
            f"--pd-loss {config.loss} gave a tensor of shape {tuple(loss_T.shape)} for rows of "
            f"shape {tuple(teacher.counts.shape)}; it must give one number a row."
        )
    match _weight_name(config):
        case "tau-squared":
            loss_T = loss_T * rows.tau.square().squeeze(-1)
        case "tempered-mass":
            loss_T = loss_T * rows.tempered_log_mass.exp().squeeze(-1)
    return torch.where(teacher.counts > 0, loss_T, 0.0)


def mix(alpha: float, lm_T: Tensor, kd_T: Tensor, counts_T: Tensor) -> Tensor:
    """Eq. 1, (1 − α)·L_lm + α·L_kd; a token without a teacher (count 0) has the LM loss alone."""
    return torch.where(counts_T > 0, torch.lerp(lm_T, kd_T, alpha), lm_T)


def mix_gradient(alpha: float, counts_T: Tensor) -> Tensor:
    """float32 [2, T], the derivatives of `mix` by the LM and by the KD loss."""
    kd_T = alpha * (counts_T > 0).float()
    return torch.stack([1 - kd_T, kd_T])


def _rows(
    config: PDConfig,
    teacher: TeacherTargets,
    logq_TK: Tensor,
    label_logq_T: Tensor,
    labels_T: Tensor,
    tempered_logq_TK: Tensor | None,
    tempered_label_logq_T: Tensor | None,
) -> Rows:
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
    return Rows(
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
        tempered_label_log_q=label_logq_T
        if tempered_label_logq_T is None
        else tempered_label_logq_T,
    )


def _weight_name(config: PDConfig) -> str:
    """What a row's loss and gradient are multiplied by, as `row_divergence` names it."""
    if config.adaptive_temperature == "wttm":
        return "tempered-mass"
    return "tau-squared" if config.tau_squared or config.adaptive_temperature == "normkd" else "one"

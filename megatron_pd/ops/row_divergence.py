"""Distillation loss of sparse rows and its gradient in one operator.

Fuses the per-token loss and its gradient, about 85 small PyTorch operations in
`distill/objective.py`, into one kernel. A row is gone over once, and the gradient with respect to
the student's log-probabilities comes with the loss, so that the backward pass is one
multiplication. The formulas are in csrc/row_divergence/row.h.

A fast path, never the gate: `is_fused` says which losses and tail policies it knows.

Legend: T any leading shape (tokens), K entries of a teacher row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_pd.ops.library import operators

__all__ = ["FUSED_LOSSES", "FUSED_TAILS", "is_fused", "row_divergence"]

FUSED_LOSSES = ("nll", "kld", "reverse-kld", "jsd", "mse-prob")
FUSED_TAILS = ("renormalize", "raw", "ghost", "to-label", "decoupled", "sampled")


def is_fused(loss: str, tail: str) -> bool:
    """Whether the operator knows this loss and this tail policy."""
    return loss in FUSED_LOSSES and tail in FUSED_TAILS


def row_divergence(
    log_q: Tensor,
    label_log_q: Tensor,
    ids: Tensor,
    log_t: Tensor,
    counts: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    tail: str,
    loss: str,
    weight: str = "one",
    jsd_beta: float = 0.5,
) -> Tensor:
    """Return the loss of each row, [...], in nats; 0 where a row has no entry.

    Args:
        log_q: float32 or float64 [..., K], the student's full-vocabulary log-probabilities at
            `ids`, at temperature 1.
        label_log_q: [...], the same at the labels.
        ids: int32 [..., K], the teacher's.
        log_t: [..., K], the teacher's full-vocabulary log-probabilities at temperature 1.
        counts: int32 [...], entries of each row, which are its first columns; the rest is ignored.
        labels: int64 [...].
        temperature: [...], or [..., 1], the teacher's, positive.
        tail: one of FUSED_TAILS.
        loss: one of FUSED_LOSSES.
        weight: of a row's loss: "one", "tau-squared" (τ²) or "tempered-mass" (Σ t^(1/τ)).
        jsd_beta: the teacher's weight in the mixture of "jsd".

    Gradients go to `log_q` and, under "to-label", to `label_log_q`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names don't fit.
    """
    return _RowDivergence.apply(
        log_q, label_log_q, ids, log_t, counts, labels, temperature, tail, loss, weight, jsd_beta
    )


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_q: Tensor,
        label_log_q: Tensor,
        ids: Tensor,
        log_t: Tensor,
        counts: Tensor,
        labels: Tensor,
        temperature: Tensor,
        *names_and_beta: str | float,
    ) -> Tensor:
        rows, columns = counts.numel(), ids.shape[-1]
        loss_T, grad_TK, grad_label_T = operators.row_divergence(
            log_q.reshape(rows, columns),
            label_log_q.reshape(-1).contiguous(),
            ids.reshape(rows, columns).contiguous(),
            log_t.reshape(rows, columns).contiguous(),
            counts.reshape(-1).contiguous(),
            labels.reshape(-1).contiguous(),
            temperature.reshape(-1).contiguous(),
            *names_and_beta,
        )
        ctx.save_for_backward(grad_TK.view(log_q.shape), grad_label_T.view(counts.shape))
        ctx.has_label_gradient = names_and_beta[0] == "to-label"
        return loss_T.view(counts.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_label = ctx.saved_tensors
        of_label = grad_label * gradients[0] if ctx.has_label_gradient else None
        return grad * gradients[0].unsqueeze(-1), of_label, *(None,) * 9

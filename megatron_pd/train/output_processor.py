"""Hidden states → per-token LM and KD losses, at the end of the last pipeline stage.

Megatron's `GPTModel.forward(..., output_processor=...)` (megatron-core ≥ 0.17) hands over the
hidden states, its output layer and its weight instead of computing the LM loss itself.

Axes: S sequence, B micro-batch, H hidden, V this rank's vocabulary, K columns of a teacher row;
column 0 of `ids_SBK` is the label, so one pass over the logits serves both losses.

With `chunk_tokens` the output layer and the loss run on pieces of the sequence and are recomputed
in the backward pass, so that the logits of one piece exist at a time. Recomputation is
non-reentrant: the output weight's gradient is summed by the outer graph and reaches DDP's
gradient hook once, as it does without chunks. Megatron's gradient accumulation fusion sums it over
the chunks in float32; without the fusion that is done here, since autograd would sum in bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import distillation_loss
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.ops import sparse_log_softmaxes

__all__ = ["DistillationContext", "distillation_output_processor", "gathered_positions"]


@dataclass(frozen=True)
class DistillationContext:
    """What the output processor needs beside the model's own tensors."""

    config: PDConfig
    teacher: TeacherTargets
    """Rows of this rank's tokens, batch first: ids and logprobs [B, S, K], counts [B, S]."""

    tp_group: torch.distributed.ProcessGroup
    sequence_parallel: bool


def distillation_output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: DistillationContext,
    scale_logits: Any,
    runtime_gather_output: bool | None,
    **_unused: Any,
) -> Tensor:
    """Per-token losses of the micro-batch.

    Args:
        hidden_states: [S, B, H], or [S / tp, B, H] under sequence parallelism.
        labels: int64 [B, S].
    Returns:
        float32 [2, B, S]: the LM loss and the KD loss of every token, in nats. The KD loss is 0
        where there is no teacher.
    """
    labels_SB = labels.transpose(0, 1)
    teacher_SBK = context.teacher.map(lambda rows: rows.transpose(0, 1))

    def losses(hidden_SBH: Tensor, weight: Tensor | None, positions: Tensor | slice) -> Tensor:
        logits_SBV, _ = output_layer(
            hidden_SBH, weight=weight, runtime_gather_output=runtime_gather_output
        )
        return _token_losses(
            scale_logits(logits_SBV),
            labels_SB[positions],
            teacher_SBK.map(lambda rows: rows[positions]),
            context,
        )

    ranks = context.tp_group.size() if context.sequence_parallel else 1
    local_length, batch_size = hidden_states.shape[:2]
    chunk = _chunk_length(context.config.loss_chunk_tokens, batch_size, ranks, local_length)
    if chunk >= local_length:
        return losses(hidden_states, output_weight, slice(None)).transpose(1, 2)
    losses_2SB = torch.empty(
        2, ranks * local_length, batch_size, dtype=torch.float32, device=hidden_states.device
    )
    starts = range(0, local_length, chunk)
    weight_of_chunk = _weights_of_chunks(output_layer, output_weight, len(starts))
    for start in starts:
        hidden_SBH = hidden_states[start : start + chunk]
        positions = gathered_positions(start, len(hidden_SBH), local_length, ranks).to(
            hidden_states.device
        )
        losses_2SB[:, positions] = checkpoint(
            losses, hidden_SBH, weight_of_chunk(), positions, use_reentrant=False
        )
    return losses_2SB.transpose(1, 2)


def _weights_of_chunks(
    output_layer: Any, output_weight: Tensor | None, chunks: int
) -> Callable[[], Tensor | None]:
    """What gives each chunk its weight, so that their gradients are summed in float32."""
    weight = output_layer.weight if output_weight is None else output_weight
    if output_layer.gradient_accumulation_fusion or weight.dtype == torch.float32:
        return lambda: output_weight
    total = _FloatSum(chunks)
    return lambda: _WeightOfChunk.apply(weight, total)


class _FloatSum:
    """A sum in float32 of a known number of tensors."""

    def __init__(self, terms: int) -> None:
        self.terms = self.left = terms
        self.value: Tensor | None = None

    def add(self, term: Tensor) -> Tensor | None:
        """The whole sum, in the terms' dtype, once the last term is in."""
        self.value = term.float() if self.value is None else self.value.add_(term)
        self.left -= 1
        if self.left:
            return None
        result, self.value, self.left = self.value.to(term.dtype), None, self.terms
        return result


class _WeightOfChunk(torch.autograd.Function):
    """The weight; its gradient goes to `total`, and on from the chunk that completes it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: _FloatSum) -> Tensor:
        ctx.total = total
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return ctx.total.add(gradients[0]), None


def gathered_positions(start: int, length: int, local_length: int, ranks: int) -> Tensor:
    """Sequence positions that the output layer returns for a chunk of this rank's hidden states.

    Under sequence parallelism every TP rank holds `local_length` consecutive positions, and the
    output layer gathers the same chunk of each: rank-major, so not adjacent.

    Returns:
        int64 [ranks * length].
    """
    offsets = torch.arange(ranks) * local_length + start
    return (offsets[:, None] + torch.arange(length)).flatten()


def _chunk_length(chunk_tokens: int | None, batch_size: int, ranks: int, local_length: int) -> int:
    """Local sequence positions a chunk, so that its logits cover about `chunk_tokens` tokens."""
    if chunk_tokens is None:
        return local_length
    return max(1, chunk_tokens // (batch_size * ranks))


def _token_losses(
    logits_SBV: Tensor, labels_SB: Tensor, teacher_SBK: TeacherTargets, context: DistillationContext
) -> Tensor:
    """[2, S, B]: the LM and the KD loss of every token."""
    config = context.config
    ids_SBK = torch.cat([labels_SB.unsqueeze(-1).int(), teacher_SBK.ids], dim=-1)
    temperatures = [1.0]
    if config.needs_tempered_student:
        temperatures.append(config.student_temperature)
    (logq_SBK, _), *tempered = sparse_log_softmaxes(
        logits_SBV, ids_SBK, temperatures, tp_group=context.tp_group, inplace_backward=True
    )
    label_logq_SB = logq_SBK[..., 0]
    kd_SB = distillation_loss(
        config,
        teacher_SBK,
        logq_SBK[..., 1:],
        label_logq_SB,
        labels_SB,
        *(part for logq_SBK, _ in tempered for part in (logq_SBK[..., 1:], logq_SBK[..., 0])),
    )
    return torch.stack([-label_logq_SB, kd_SB])

"""Hidden states → per-token LM and KD losses, at the end of the last pipeline stage.

Megatron's `GPTModel.forward(..., output_processor=...)` (megatron-core ≥ 0.17) hands over the
hidden states, its output layer and its weight instead of computing the LM loss itself.

Axes: S sequence, B micro-batch, H hidden, V this rank's vocabulary, K columns of a teacher row;
column 0 of `ids_SBK` is the label, so one pass over the logits serves both losses.

With `--pd-loss-chunk-tokens` the output layer and the losses run on pieces of the sequence:
`chunked_losses.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import distillation_loss
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.ops import sparse_log_softmax, sparse_log_softmaxes
from megatron_pd.train.chunked_losses import Chunk, Layer, losses_in_chunks

__all__ = ["DistillationContext", "distillation_output_processor"]

_AUTO_CHUNK_TOKENS = 2048
"""Enough for matrix products that keep a GPU busy."""


@dataclass(frozen=True)
class DistillationContext:
    """What the output processor needs beside the model's own tensors."""

    config: PDConfig
    teacher: TeacherTargets
    """Rows of this rank's tokens, batch first: ids and logprobs [B, S, K], counts [B, S]."""

    tp_group: torch.distributed.ProcessGroup
    sequence_parallel: bool

    expected_gradient: Tensor | None = None
    """float32 [2, B, S], what backward will bring for the two losses of each token, up to one
    factor that all tokens share. Chunks need it."""


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

    def logits_of(hidden_SBH: Tensor) -> Tensor:
        logits_SBV, _ = output_layer(
            hidden_SBH, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return logits_SBV

    def losses_of_chunk(logits_SBV: Tensor, chunk: Chunk) -> Tensor:
        return _token_losses(
            scale_logits(logits_SBV), chunk.of(labels_SB), teacher_SBK.map(chunk.of), context
        )

    ranks = context.tp_group.size() if context.sequence_parallel else 1
    length = _chunk_length(context.config.loss_chunk_tokens, hidden_states, ranks)
    if length >= len(hidden_states):
        logits_SBV = scale_logits(logits_of(hidden_states))
        return _token_losses(logits_SBV, labels_SB, teacher_SBK, context).transpose(1, 2)
    if context.expected_gradient is None:
        raise ValueError("--pd-loss-chunk-tokens needs DistillationContext.expected_gradient.")
    layer = Layer(
        logits_of,
        context.tp_group,
        context.sequence_parallel,
        output_layer.gradient_accumulation_fusion,
    )
    return losses_in_chunks(
        layer,
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        losses_of_chunk,
        context.expected_gradient.transpose(1, 2),
        length,
    ).transpose(1, 2)


def _chunk_length(
    chunk_tokens: int | Literal["auto"] | None, hidden_states: Tensor, ranks: int
) -> int:
    """Local sequence positions a chunk, so that its logits cover about `chunk_tokens` tokens.

    Args:
        ranks: those whose hidden states the output layer gathers.
    """
    local_length, batch_size, hidden_size = hidden_states.shape
    if chunk_tokens == "auto":
        # Bytes for each id of the vocabulary: logits, and a float32 row of the weight's gradient.
        saved = local_length * batch_size * ranks - _AUTO_CHUNK_TOKENS
        saves = saved * hidden_states.element_size() > 4 * hidden_size
        chunk_tokens = _AUTO_CHUNK_TOKENS if saves else None
    if chunk_tokens is None:
        return local_length
    return max(1, chunk_tokens // (batch_size * ranks))


def _token_losses(
    logits_SBV: Tensor, labels_SB: Tensor, teacher_SBK: TeacherTargets, context: DistillationContext
) -> Tensor:
    """[2, S, B]: the LM and the KD loss of every token."""
    config = context.config
    if teacher_SBK.ids.shape[-1] == 0:
        logq_SB1, _ = sparse_log_softmax(
            logits_SBV, labels_SB.unsqueeze(-1), tp_group=context.tp_group, inplace_backward=True
        )
        lm_SB = -logq_SB1.squeeze(-1)
        return torch.stack([lm_SB, torch.zeros_like(lm_SB)])
    ids_SBK = torch.cat([labels_SB.unsqueeze(-1).int(), teacher_SBK.ids], dim=-1)
    temperatures = [1.0]
    if config.needs_tempered_student:
        temperatures.append(config.student_temperature)
    at_temperatures = sparse_log_softmaxes(
        logits_SBV, ids_SBK, temperatures, tp_group=context.tp_group, inplace_backward=True
    )
    columns = [1, teacher_SBK.ids.shape[-1]]
    (label_logq_SB, logq_SBK), *tempered = (
        (label_SB1.squeeze(-1), rows_SBK)
        for label_SB1, rows_SBK in (logq.split(columns, dim=-1) for logq, _ in at_temperatures)
    )
    kd_SB = distillation_loss(
        config,
        teacher_SBK,
        logq_SBK,
        label_logq_SB,
        labels_SB,
        *(part for label_SB, rows_SBK in tempered for part in (rows_SBK, label_SB)),
    )
    return torch.stack([-label_logq_SB, kd_SB])

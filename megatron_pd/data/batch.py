"""One micro-batch on this rank: Megatron's own tensors, and the teacher's rows where they are used.

The data loader lives on the first TP rank of the first and last pipeline stages. Megatron
broadcasts tokens, labels and masks from there to the other TP ranks; the teacher's rows take the
same way on the last stage only, and are then cut for context parallelism with the rest.
"""

import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers

from megatron_pd.data.addresses import ADDRESSES
from megatron_pd.data.dataset import ROWS_SECONDS
from megatron_pd.data.prefetch import prefetch
from megatron_pd.distill.targets import TeacherTargets

__all__ = ["ROWS_TIMER", "builds_dataset", "get_batch"]

ROWS_TIMER = "teacher-rows"
"""Megatron's timer, of log level 2: an upper bound on the time spent waiting for teacher rows, the
device copy and TP broadcast plus min(wait for the micro-batch, time to read its rows)."""

_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# Keys that Megatron's functions look up for packed sequences, which this data loader has none of.
_ABSENT = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def builds_dataset(vp_stage: int | None, config: Any) -> bool:
    """Whether this rank reads data itself: the first TP rank of a stage that uses tokens or labels.

    Args:
        config: the model's TransformerConfig, which says where multi-token prediction runs.
    """
    return mpu.get_tensor_model_parallel_rank() == 0 and _uses_data(vp_stage, config)


def get_batch(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    *,
    vp_stage: int | None,
    config: Any,
    teacher_columns: int,
    teacher_statistic: str | None = None,
    addressed: bool = False,
) -> dict[str, Any]:
    """The next micro-batch, on this rank's device; None for what this pipeline stage doesn't need.

    Args:
        teacher_columns: K of the teacher's rows; 0 where the samples carry none.
        teacher_statistic: the statistic of every row that the samples also carry.
        addressed: whether the samples carry the addresses of their tokens.
    Returns:
        tokens, labels, position_ids int64 [B, S], loss_mask float32 [B, S], attention_mask, and on
        the last stage with `teacher_columns` also what `TeacherTargets.from_batch` finds, rows
        [B, S, K]; the addresses [B, S, 3] on the first TP rank of the last stage. S is this
        context-parallel rank's share.
    """
    args = get_args()
    if not _uses_data(vp_stage, config):
        return dict.fromkeys(_KEYS)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    is_last_stage = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    has_rows = teacher_columns > 0 and is_last_stage
    sample: dict[str, torch.Tensor] = {}
    waited = 0.0
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        assert iterator is not None
        if has_rows:
            prefetch(iterator)
        begin = time.perf_counter()
        sample = next(iterator)
        waited = time.perf_counter() - begin
        batch = {key: sample[key].cuda(non_blocking=True) for key in _KEYS if key in sample}
        batch = {**dict.fromkeys((*_KEYS, *_ABSENT)), **batch}
    training = torch.is_grad_enabled()
    micro_batch_size = args.micro_batch_size if training else args.eval_micro_batch_size
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(vp_stage, config),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=is_last_stage,
    )
    if has_rows:
        shape = (micro_batch_size, args.seq_length)
        timer = get_timers()(ROWS_TIMER, log_level=2)
        timer.start()
        statistics = [] if teacher_statistic is None else [teacher_statistic]
        targets = _rows_on_this_tp_rank(sample, shape, teacher_columns, statistics)
        batch.update(targets.to_sample())
        timer.stop()
        if ROWS_SECONDS in sample:
            gathering = float(sample[ROWS_SECONDS].sum())
            timer.set_elapsed(timer.elapsed(reset=False) + min(waited, gathering))
    if addressed and is_last_stage and tp_rank == 0:
        batch[ADDRESSES] = sample[ADDRESSES].cuda(non_blocking=True)
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def _rows_on_this_tp_rank(
    sample: dict[str, torch.Tensor],
    shape: tuple[int, int],
    columns: int,
    statistics: Collection[str],
) -> TeacherTargets:
    """The sample's teacher rows on every TP rank; the first one has them."""
    read = TeacherTargets.from_batch(sample)
    if mpu.get_tensor_model_parallel_world_size() == 1:
        assert read is not None
        return read.map(lambda rows: rows.cuda(non_blocking=True))
    targets = TeacherTargets.empty(shape, columns, statistics, torch.cuda.current_device())
    for name, buffer in targets.tensors().items():
        if read is not None:
            buffer.copy_(read.tensors()[name], non_blocking=True)
        torch.distributed.broadcast(
            buffer,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    return targets


def _uses_data(vp_stage: int | None, config: Any) -> bool:
    ignore_virtual = vp_stage is None
    return (
        mpu.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage)
        or _has_mtp(vp_stage, config)
    )


def _has_mtp(vp_stage: int | None, config: Any) -> bool:
    return config.mtp_num_layers is not None and mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=vp_stage is None,
        vp_stage=vp_stage,
    )

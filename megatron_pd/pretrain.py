"""Pre-train a GPT student with Megatron, with or without distillation.

    torchrun --nproc-per-node N -m megatron_pd.pretrain <Megatron flags> [--pd-* flags]

Megatron's own `pretrain()` is the training loop. What is added to it: the `--pd-*` flags, a GPT
dataset that carries the teacher's rows, and a forward step that hands them to the output processor.
Without a PD flag the run is plain language-model pre-training with Megatron's own loss.

    flags → PDConfig → teacher data checked → datasets → forward_step → loss
"""

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_pd import cpu
from megatron_pd.errors import UserError, reporting_errors

with reporting_errors():
    cpu.install()  # before Megatron is imported

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_pd import gpu
from megatron_pd.arguments import (
    PDConfig,
    add_pd_arguments,
    pd_config_from_args,
    resolve_schedule,
    total_samples,
)
from megatron_pd.data.batch import ROWS_TIMER, builds_dataset, get_batch
from megatron_pd.data.dataset import PDGPTDataset, PDGPTDatasetConfig, dataset_fields
from megatron_pd.losses import mix
from megatron_pd.megatron_hooks import (
    print_timer,
    resume_distributed_optimizer,
    skip_helpers_compilation,
)
from megatron_pd.output_processor import DistillationContext, distillation_output_processor
from megatron_pd.record import changes, record_of, record_of_checkpoint
from megatron_pd.schedules import AlphaSchedule, alpha_at
from megatron_pd.targets import TeacherTargets
from megatron_pd.teacher.data import TeacherData, open_teacher_data

__all__ = ["main"]


@dataclass(frozen=True)
class Distillation:
    """All that distils in this run."""

    config: PDConfig
    schedule: AlphaSchedule
    total_samples: int
    data: TeacherData


def main() -> int:
    """Parse, check, train. Returns the exit status; bad input raises UserError before training."""
    _refuse_early(parse_args(_extra_arguments))
    args = parse_and_validate_args(_extra_arguments)
    distillation = _build_distillation(args)
    # In the arguments, the record is kept in checkpoints.
    args.pd_resolved = None
    if distillation is not None:
        args.pd_resolved = record_of(
            distillation.config, distillation.schedule, distillation.total_samples
        )
    if int(os.environ.get("RANK", "0")) == 0:
        print(_report(args), flush=True)
    skip_helpers_compilation()
    resume_distributed_optimizer()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    provider: Any = functools.partial(
        _provide_datasets, distillation=distillation, model_config=config.model.transformer
    )
    provider.is_distributed = True  # every rank calls it; each knows whether it reads data
    pretrain(
        config,
        provider,
        ModelType.encoder_or_decoder,
        functools.partial(_forward_step, distillation=distillation),
    )
    return 0


def _report(args: Any) -> str:
    """What distillation does in this run, for the log, and what is new since its checkpoint."""
    if args.pd_resolved is None:
        lines = ["pre-training distillation: off"]
    else:
        lines = ["pre-training distillation:"]
        lines += [
            f"  {name} {' '.join(value) if isinstance(value, list) else value}"
            for name, value in args.pd_resolved.items()
            if value is not None and value is not False
        ]
    if args.pd_recipe_set:
        lines.append(f"--pd-recipe {args.pd_recipe} set {', '.join(args.pd_recipe_set)}")
    try:
        changed = changes(record_of_checkpoint(args), args.pd_resolved)
    except LookupError:
        return "\n".join(lines)
    if changed:
        lines.append(f"distillation differs from that of the checkpoint in {args.load}:")
        lines += [f"  {change}" for change in changed]
    return "\n".join(lines)


def _extra_arguments(parser):
    cpu.set_cpu_defaults(parser)
    gpu.set_gpu_defaults(parser)
    # Megatron 0.19.2 divides by it even where --eval-iters 0 asks for no validation.
    parser.set_defaults(eval_interval=1000)
    return add_pd_arguments(parser)


def _refuse_early(args: Any) -> None:
    """What Megatron would refuse with an assertion, or not at all, is refused with a sentence."""
    cpu.check_cpu_args(args)
    gpu.check_gpu_args(args)
    config = pd_config_from_args(args)
    unsupported = {
        "--dataloader-inter-document-masking": args.dataloader_inter_document_masking,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--sft": args.sft,
        "--fim-data": args.fim_data,
        "--mock-data (with --pd-* flags)": args.mock_data and config is not None,
        "--logits-load-dir": args.logits_load_dir,
        "--logits-save-dir": args.logits_save_dir,
    }
    for flag, given in unsupported.items():
        if given:
            raise UserError(
                f"{flag} is not supported by megatron_pd.pretrain, which trains on the tokens of "
                "--data-path and on their logit store: drop the flag."
            )


def _build_distillation(args: Any) -> Distillation | None:
    config = pd_config_from_args(args)
    if config is None:
        return None
    return Distillation(
        config,
        resolve_schedule(config, args),
        total_samples(args),
        open_teacher_data(args, config),
    )


def _provide_datasets(
    num_samples: list[int],
    vp_stage: int | None = None,
    *,
    distillation: Distillation | None,
    model_config: Any,
) -> tuple[Any, Any, Any]:
    """The train, validation and test datasets of this rank (Megatron's dataset provider)."""
    args = get_args()
    fields = dataset_fields(args)
    dataset_class: type[GPTDataset]
    if args.mock_data:
        dataset_class, config = MockGPTDataset, GPTDatasetConfig(**fields)
    elif distillation is None:
        dataset_class, config = GPTDataset, GPTDatasetConfig(**fields)
    else:
        print_timer(get_timers(), ROWS_TIMER)  # there are no timers before pretrain()
        dataset_class = PDGPTDataset
        config = PDGPTDatasetConfig(
            **fields,
            stores=distillation.data.stores,
            teacher_columns=distillation.data.columns if _is_last_stage(vp_stage) else 0,
            teacher_statistic=distillation.data.statistic,
            teacher_timed=args.timing_log_level >= 2,
        )
    return BlendedMegatronDatasetBuilder(
        dataset_class,
        num_samples,
        functools.partial(builds_dataset, vp_stage, model_config),
        config,
    ).build()


def _is_last_stage(vp_stage: int | None) -> bool:
    return mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def _forward_step(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: torch.nn.Module,
    *,
    distillation: Distillation | None,
) -> tuple[torch.Tensor, Any]:
    """One micro-batch through this pipeline stage (Megatron's forward step)."""
    args, timers = get_args(), get_timers()
    # Validation measures the language model alone, with or without distillation in training.
    distils = distillation if model.training else None
    timers("batch-generator", log_level=2).start()
    batch = get_batch(
        iterator,
        vp_stage=get_attr_wrapped_model(model, "vp_stage"),
        config=get_attr_wrapped_model(model, "config"),
        teacher_columns=distils.data.columns if distils else 0,
        teacher_statistic=distils is not None and distils.data.statistic is not None,
    )
    timers("batch-generator").stop()
    inputs = {
        "input_ids": batch["tokens"],
        "position_ids": batch["position_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
    }
    if distils is None or batch.get("teacher_ids") is None:
        return model(**inputs), functools.partial(_lm_loss, batch["loss_mask"])
    statistic = distils.data.statistic
    teacher = TeacherTargets(
        batch["teacher_ids"],
        batch["teacher_logprobs"],
        batch["teacher_counts"],
        **({} if statistic is None else {statistic: batch["teacher_statistic"]}),
    )
    losses_2BS = model(
        **inputs,
        output_processor=distillation_output_processor,
        output_processor_context=DistillationContext(
            distils.config,
            teacher,
            tp_group=get_attr_wrapped_model(model, "tp_group"),
            sequence_parallel=args.sequence_parallel,
        ),
    )
    alpha = alpha_at(distils.schedule, args.consumed_train_samples, distils.total_samples)
    return losses_2BS, functools.partial(_pd_loss, batch["loss_mask"], teacher.counts, alpha)


Report = dict[str, torch.Tensor]
"""What a micro-batch reports: name → [sum, count]. Megatron adds both up over micro-batches and
data-parallel ranks, and logs sum / count."""


def _lm_loss(
    loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Megatron's language-model loss: the sum over the micro-batch's valid tokens.

    Returns:
        the sum, the number of valid tokens (int32), and the report.
    """
    loss = (losses_BS.float() * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    _check_finite(loss)
    return loss, tokens.int(), {"lm loss": _ratio(loss, tokens)}


def _pd_loss(
    loss_mask_BS: torch.Tensor,
    counts_BS: torch.Tensor,
    alpha: float,
    losses_2BS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """L = (1 − α)·L_lm + α·L_kd (Eq. 1), summed over the micro-batch's valid tokens.

    Args:
        counts_BS: entries in the teacher's row of each token; 0 where there is no teacher.
    Returns:
        the sum, the number of valid tokens (int32), and the report.
    """
    lm_BS, kd_BS = losses_2BS.float().unbind(0)
    taught_BS = (counts_BS > 0) * loss_mask_BS
    loss = (mix(alpha, lm_BS, kd_BS, counts_BS) * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    _check_finite(loss)
    return (
        loss,
        tokens.int(),
        {
            "lm loss": _ratio((lm_BS * loss_mask_BS).sum(), tokens),
            "kd loss": _ratio((kd_BS * taught_BS).sum(), taught_BS.sum()),
            "alpha": _ratio(torch.full_like(tokens, alpha), torch.ones_like(tokens)),
            "teacher tokens": _ratio(taught_BS.sum(), tokens),
        },
    )


def _ratio(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[sum, count] for Megatron's log; the least positive float keeps 0 / 0 at 0."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([total.detach().float(), count.detach().float() + tiny])


def _check_finite(loss: torch.Tensor) -> None:
    """As Megatron's own loss function does: its rerun machine tells a bad node from bad maths."""
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    for rejection, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=rejection,
            message=f"found {what} in local forward loss calculation",
            tolerance=0.0,
            fatal=True,
        )


if __name__ == "__main__":
    with reporting_errors():
        sys.exit(main())

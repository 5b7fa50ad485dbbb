"""A training run: Megatron's own `pretrain()` with the --pd-* flags, teacher data and forward step.

flags → PDConfig → teacher data checked → datasets → forward_step → loss
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args

from megatron_pd.data.batch import ROWS_TIMER, builds_dataset
from megatron_pd.data.dataset import PDGPTDataset, PDGPTDatasetConfig, dataset_fields
from megatron_pd.errors import UserError
from megatron_pd.megatron import cpu, optional_kernels
from megatron_pd.megatron.arguments import (
    LearningRate,
    add_pd_arguments,
    learning_rate_of_flags,
    pd_config_from_args,
    total_samples,
)
from megatron_pd.megatron.launch import be_one_process_without_torchrun, validated_args
from megatron_pd.megatron.patches import (
    keep_scheduler,
    print_timer,
    resume_distributed_optimizer,
    skip_helpers_compilation,
)
from megatron_pd.train.forward_step import Distillation, forward_step
from megatron_pd.train.resolved_config import (
    args_of_checkpoint,
    changes,
)
from megatron_pd.train.teacher_data import check_same_everywhere, open_teacher_data

__all__ = ["main"]


def main() -> int:
    """Parse, check, train. Returns the exit status; bad input raises UserError before training.

    Without torchrun, this is a run of one process.
    """
    be_one_process_without_torchrun()
    _refuse_early(parse_args(_extra_arguments))
    args = validated_args(_extra_arguments)
    distillation = _build_distillation(args)
    saved = args_of_checkpoint(args) if args.rank == 0 else None
    _check_layout(args, saved)
    _check_wsd(args, saved)
    skip_helpers_compilation()
    resume_distributed_optimizer()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    provider: Any = functools.partial(
        _provide_datasets,
        distillation=distillation,
        begin=functools.partial(_begin, args, distillation, saved, keep_scheduler()),
        model_config=config.model.transformer,
    )
    provider.is_distributed = True  # every rank calls it; each knows whether it reads data
    pretrain(
        config,
        provider,
        ModelType.encoder_or_decoder,
        functools.partial(forward_step, distillation=distillation),
    )
    return 0


def _begin(
    args: Any,
    distillation: Distillation | None,
    saved: Any | None,
    scheduler_in_use: Callable[[], LearningRate | None],
) -> None:
    """When Megatron has loaded its checkpoint: let α go by its learning rate, and report."""
    # Megatron keeps its arguments in checkpoints, and this with them.
    args.pd_resolved = None
    if distillation is not None:
        distillation.learning_rate = scheduler_in_use() or distillation.learning_rate
        args.pd_resolved = distillation.resolved()
    if args.rank == 0:
        print(_report(args, saved), flush=True)


def _report(args: Any, saved: Any | None) -> str:
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
    changed = changes(saved.pd_resolved, args.pd_resolved) if saved is not None else []
    if args.use_checkpoint_opt_param_scheduler and saved is not None and args.pd_resolved:
        lines.append("α follows the learning rate that the checkpoint has, not that of the flags")
    if changed:
        lines.append(f"distillation differs from that of the checkpoint in {args.load}:")
        lines += [f"  {change}" for change in changed]
    return "\n".join(lines)


def _check_layout(args: Any, saved: Any | None) -> None:
    """Megatron 0.19 names another flag than the one that a change of TP or PP needs."""
    if saved is None or args.no_load_optim or not saved.use_distributed_optimizer:
        return
    layouts = [
        (run.tensor_model_parallel_size, run.pipeline_model_parallel_size) for run in (saved, args)
    ]
    if layouts[0] != layouts[1] and not getattr(saved, "dist_ckpt_optim_fully_reshardable", True):
        raise UserError(
            f"The checkpoint in {args.load} was saved with tensor and pipeline parallelism of "
            f"{layouts[0][0]} and {layouts[0][1]}, this run has {layouts[1][0]} and "
            f"{layouts[1][1]}, and its distributed optimizer's state fits the first alone: go on "
            "in the old layout until a checkpoint was saved with "
            "--dist-ckpt-optim-fully-reshardable, or give --no-load-optim to go on from the "
            "weights with a new optimizer and learning rate."
        )


def _check_wsd(args: Any, saved: Any | None) -> None:
    """Megatron 0.19 keeps the phases of a WSD learning rate in checkpoints, but not its decay."""
    if saved is None or not args.use_checkpoint_opt_param_scheduler:
        return
    unit = "iters" if args.train_iters else "samples"
    if saved.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(
            f"--use-checkpoint-opt-param-scheduler: the learning rate of the checkpoint in "
            f"{args.load} is WSD, and Megatron keeps all of it but the decay's length and style: "
            f"give --lr-wsd-decay-{unit} and --lr-wsd-decay-style too."
        )


def _extra_arguments(parser):
    cpu.set_cpu_defaults(parser)
    optional_kernels.set_gpu_defaults(parser)
    # Megatron 0.19.2 divides by it even where --eval-iters 0 asks for no validation.
    parser.set_defaults(eval_interval=1000)
    return add_pd_arguments(parser)


def _refuse_early(args: Any) -> None:
    """What Megatron would refuse with an assertion, or not at all, is refused with a sentence."""
    cpu.check_cpu_args(args)
    optional_kernels.check_gpu_args(args)
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
    distillation = Distillation(
        config, open_teacher_data(args, config), total_samples(args), learning_rate_of_flags(args)
    )
    distillation.resolved()  # raises where the α schedule needs more steps than there are
    return distillation


def _provide_datasets(
    num_samples: list[int],
    vp_stage: int | None = None,
    *,
    distillation: Distillation | None,
    begin: Callable[[], None],
    model_config: Any,
) -> tuple[Any, Any, Any]:
    """The train, validation and test datasets of this rank (Megatron's dataset provider)."""
    args = get_args()
    if not vp_stage:
        begin()
    fields = dataset_fields(args)
    dataset_class: type[GPTDataset]
    if args.mock_data:
        dataset_class, config = MockGPTDataset, GPTDatasetConfig(**fields)
    elif distillation is None:
        dataset_class, config = GPTDataset, GPTDatasetConfig(**fields)
    else:
        print_timer(get_timers(), ROWS_TIMER)  # there are no timers before pretrain()
        check_same_everywhere(distillation.data)  # nor could the ranks talk to each other
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

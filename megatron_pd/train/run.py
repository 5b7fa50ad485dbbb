"""A training run: Megatron's own `pretrain()` with the --pd-* flags, teacher data and forward step.

flags → PDConfig → teacher data checked → datasets → forward_step → loss
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args, get_timers, get_tokenizer, pretrain

from megatron_pd.data.addresses import AddressedGPTDataset, AddressedGPTDatasetConfig
from megatron_pd.data.batch import ROWS_TIMER, builds_dataset
from megatron_pd.data.dataset import PDGPTDataset, PDGPTDatasetConfig, dataset_fields
from megatron_pd.megatron import cpu, optional_kernels
from megatron_pd.megatron.arguments import (
    LearningRate,
    add_pd_arguments,
    learning_rate_of_flags,
    lm_config_from_args,
    pd_config_from_args,
    total_samples,
)
from megatron_pd.megatron.launch import (
    be_one_process_without_torchrun,
    config_of_args,
    parsed_args,
    validated_args,
)
from megatron_pd.megatron.patches import (
    before_checkpoints,
    count_experts_tokens_on_cpu,
    end_with_children,
    keep_checkpoint_writer,
    keep_scheduler,
    print_timer,
    resume_distributed_optimizer,
    skip_helpers_compilation,
    take_model_from_checkpoint,
)
from megatron_pd.megatron.unsupported import (
    check_checkpoint,
    check_flags,
    check_sequence_counts,
    check_splits,
)
from megatron_pd.train.forward_step import Distillation, forward_step
from megatron_pd.train.online_capture import (
    OnlineCapture,
    add_capture_arguments,
    capture_config_of,
)
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
    take_model_from_checkpoint()
    _refuse_early(parsed_args(_extra_arguments))
    args = validated_args(_extra_arguments)
    distillation = _build_distillation(args)
    lm_config = lm_config_from_args(args)
    capture_config = capture_config_of(args, distils=lm_config is not None)
    capture = None if capture_config is None else OnlineCapture(capture_config, args)
    saved = None
    if args.rank == 0:
        check_splits(args)
        check_sequence_counts(args, get_tokenizer().vocab_size)
        saved = args_of_checkpoint(args)
        if saved is not None:
            check_checkpoint(args, saved)
    skip_helpers_compilation()
    resume_distributed_optimizer()
    count_experts_tokens_on_cpu()
    keep_checkpoint_writer()
    end_with_children()
    config = config_of_args(args)
    provider: Any = functools.partial(
        _provide_datasets,
        distillation=distillation,
        capture=capture,
        begin=functools.partial(_begin, args, distillation, capture, saved, keep_scheduler()),
        model_config=config.model.transformer,
    )
    provider.is_distributed = True  # every rank calls it; each knows whether it reads data
    if capture is not None:
        before_checkpoints(capture.flush)
    with capture or contextlib.nullcontext():
        pretrain(
            config,
            provider,
            ModelType.encoder_or_decoder,
            functools.partial(
                forward_step, distillation=distillation, lm_config=lm_config, capture=capture
            ),
            get_embedding_ranks=functools.partial(_embedding_ranks, args, config.model.transformer),
        )
    if capture is not None:
        capture.collect()
    return 0


def _embedding_ranks(args: Any, model_config: Any, stages: list[int]) -> list[int]:
    """Of a pipeline's ranks, those with a copy of the word embeddings, which Megatron keeps equal.

    By itself Megatron takes the first and the last, and would leave a stage of multi-token
    prediction between them with embeddings of its own.
    """
    ranks = {stages[0], *get_mtp_ranks(stages, model_config)}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(stages[-1])
    return sorted(ranks)


def _begin(
    args: Any,
    distillation: Distillation | None,
    capture: OnlineCapture | None,
    saved: Any | None,
    scheduler_in_use: Callable[[], LearningRate | None],
) -> None:
    """When Megatron has loaded its checkpoint: let α go by its learning rate, and report."""
    # Megatron keeps its arguments in checkpoints, and this with them.
    args.pd_resolved = None
    if distillation is not None:
        distillation.learning_rate = scheduler_in_use() or distillation.learning_rate
        args.pd_resolved = distillation.resolved()
    if capture is not None:
        capture.begin(args.iteration)
    if args.rank == 0:
        print(_report(args, saved), flush=True)


def _report(args: Any, saved: Any | None) -> str:
    """What distillation does in this run, for the log, and what is new since its checkpoint."""
    if args.pd_resolved is None:
        way = " (--pd-lm-only: the LM loss by its kernels)" if args.pd_lm_only else ""
        lines = [f"pre-training distillation: off{way}"]
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


def _extra_arguments(parser):
    cpu.set_cpu_defaults(parser)
    optional_kernels.set_gpu_defaults(parser)
    # Megatron 0.19.2 divides by it even where --eval-iters 0 asks for no validation.
    parser.set_defaults(eval_interval=1000)
    add_capture_arguments(parser)
    return add_pd_arguments(parser)


def _refuse_early(args: Any) -> None:
    """What Megatron would refuse with an assertion, or not at all, is refused with a sentence."""
    cpu.check_cpu_args(args)
    optional_kernels.check_gpu_args(args)
    distils = pd_config_from_args(args) is not None
    check_flags(args, distils=distils)
    capture_config_of(args, distils=lm_config_from_args(args) is not None)


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
    capture: OnlineCapture | None,
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
    elif capture is not None:
        dataset_class = AddressedGPTDataset
        config = AddressedGPTDatasetConfig(**fields, corpora=capture.corpora)
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

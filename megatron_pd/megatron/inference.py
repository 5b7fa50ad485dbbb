"""A Megatron checkpoint loaded for inference and run over batches of document windows.

Axes: B windows of a batch, L their length, V this rank's vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_pd.errors import UserError, reporting_errors
from megatron_pd.megatron import cpu, optional_kernels

with reporting_errors():
    cpu.install()  # before Megatron is imported

from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from megatron_pd.data.windows import Batch
from megatron_pd.megatron.arguments import HelpFormatter
from megatron_pd.megatron.launch import (
    be_one_process_without_torchrun,
    config_of_args,
    parsed_args,
    validated_args,
)
from megatron_pd.megatron.patches import skip_helpers_compilation, take_model_from_checkpoint

__all__ = ["ForwardOnlyModel", "load_model"]


@dataclass(frozen=True)
class ForwardOnlyModel:
    """A loaded model in evaluation mode and how to run it."""

    args: Any
    tokenizer: Any
    module: torch.nn.Module
    """This rank's pipeline stage."""

    @property
    def tp_group(self) -> torch.distributed.ProcessGroup:
        return get_attr_wrapped_model(self.module, "tp_group")

    @property
    def replica(self) -> int:
        """Which model replica this rank belongs to, of `replicas`."""
        return mpu.get_data_parallel_rank()

    @property
    def replicas(self) -> int:
        return mpu.get_data_parallel_world_size()

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of its model replica that has the results to write."""
        return mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0

    @torch.no_grad()
    def run(self, batch: Batch, process: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """One forward pass through all pipeline stages; every rank of the replica calls it.

        Args:
            process: (logits [B, L, V / tp], labels [B, L]) → anything; called on every TP rank of
                the last stage.
        Returns:
            what `process` returned, or None on the other stages.
        """
        results: list[Any] = []

        def output_processor(*, hidden_states, output_layer, output_weight, scale_logits, **_):
            logits_LBV, _ = output_layer(hidden_states, weight=output_weight)
            labels = batch.labels.to(logits_LBV.device)
            results.append(process(scale_logits(logits_LBV).transpose(0, 1), labels))
            return logits_LBV.new_zeros(1)

        def forward_step(iterator, model):
            tokens = batch.tokens.cuda()
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            output = model(tokens, positions, None, output_processor=output_processor)
            return output, lambda output, **_: output

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self.module],
            num_microbatches=1,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=batch.tokens.shape[0],
            decoder_seq_length=batch.tokens.shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return results[0] if results else None


def load_model(
    add_arguments: Callable[[Any], Any], check: Callable[[Any], None] = lambda args: None
) -> ForwardOnlyModel:
    """Parse `sys.argv` with Megatron's flags and `add_arguments`', and load `--load` for inference.

    The architecture and the tokenizer come from the checkpoint unless flags say otherwise. Without
    torchrun, this is a run of one process.

    Args:
        check: is given the parsed arguments before anything is loaded, to raise UserError.
    Raises:
        UserError: no checkpoint, or something that a forward pass over documents does not support.
    """
    be_one_process_without_torchrun()

    def extra_arguments(parser):
        parser.formatter_class = HelpFormatter
        cpu.set_cpu_defaults(parser)
        optional_kernels.set_gpu_defaults(parser)
        # A checkpoint says what the model is; no optimizer, no random state, no training is needed.
        parser.set_defaults(
            use_checkpoint_args=True,
            skip_train=True,
            no_load_optim=True,
            no_load_rng=True,
            exit_on_missing_checkpoint=True,
            create_attention_mask_in_dataloader=False,
            micro_batch_size=8,
            train_iters=1,
            eval_iters=0,
            lr=0.0,
        )
        return add_arguments(parser)

    take_model_from_checkpoint()
    parsed = parsed_args(extra_arguments)
    _refuse_early(parsed)
    check(parsed)
    args = validated_args(extra_arguments)
    _refuse_interleaved_stages(args)
    skip_helpers_compilation()
    config = config_of_args(args)
    initialize_megatron()
    (module,), _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return ForwardOnlyModel(args, build_tokenizer(args), module.eval())


def _refuse_early(args: Any) -> None:
    cpu.check_cpu_args(args)
    optional_kernels.check_gpu_args(args)
    if args.load is None or not os.path.isdir(args.load):
        raise UserError(
            f"--load {args.load}: there is no checkpoint folder of that name; give the one that "
            "the model was saved to with --save."
        )
    for flag, size in {
        "--context-parallel-size": args.context_parallel_size,
        "--expert-model-parallel-size": args.expert_model_parallel_size,
    }.items():
        if size > 1:
            raise UserError(
                f"{flag} {size}: replicas run over their own documents and cannot wait for each "
                "other; split the model by --tensor-model-parallel-size and "
                "--pipeline-model-parallel-size instead."
            )


def _refuse_interleaved_stages(args: Any) -> None:
    """Megatron 0.19's interleaved schedule takes as many micro-batches as stages, or more."""
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UserError(
            f"The pipeline would have {args.virtual_pipeline_model_parallel_size} interleaved "
            "stages on each rank, which documents, run one micro-batch at a time, do not fill. "
            "Leave out --num-layers-per-virtual-pipeline-stage, "
            "--num-virtual-stages-per-pipeline-rank and --use-mp-args-from-checkpoint-args: a "
            "checkpoint loads into any number of stages."
        )

"""Job of the fork server: Megatron's flags → a run of Megatron's `pretrain()` as it is.

Nothing of megatron_pd is in it but what lets Megatron run on a CPU. Every rank reads its own data,
so that none is handed from rank to rank: what a run without --pd-* flags has to agree with.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import StragglerDetector
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_pd.megatron import cpu, patches

STRAGGLER = StragglerDetector()
OTHER_NAMES = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}


def main() -> int:
    args = parse_and_validate_args(extra_arguments)
    patches.skip_helpers_compilation()
    patches.resume_distributed_optimizer()
    patches.count_experts_tokens_on_cpu()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))

    def embedding_ranks(stages: list[int]) -> list[int]:
        used = {stages[0], *get_mtp_ranks(stages, config.model.transformer)}
        if not args.untie_embeddings_and_output_weights:
            used.add(stages[-1])
        return sorted(used)

    datasets.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        config,
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )
    return 0


def extra_arguments(parser: Any) -> Any:
    cpu.set_cpu_defaults(parser)
    parser.set_defaults(eval_interval=1000)
    return parser


def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    args = get_args()
    settings = {
        field.name: getattr(args, OTHER_NAMES.get(field.name, field.name))
        for field in fields(GPTDatasetConfig)
        if hasattr(args, OTHER_NAMES.get(field.name, field.name))
    }
    settings["blend"], settings["blend_per_split"] = get_blend_and_blend_per_split(args)
    settings["tokenizer"] = build_tokenizer(args)
    if args.per_dataset_sequences_path is not None:
        counts = json.loads(Path(args.per_dataset_sequences_path).read_text())
        settings["sequences_per_dataset"] = counts
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    config = GPTDatasetConfig(**settings)
    return BlendedMegatronDatasetBuilder(dataset, num_samples, lambda: True, config).build()


def forward_step(
    iterator: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    get_timers()("batch-generator", log_level=2).start()
    with timed(bdata=True):
        batch = next(iterator)
    get_timers()("batch-generator").stop()
    mask = batch["loss_mask"]

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        loss, tokens = (losses.float() * mask).sum(), mask.sum()
        validate(loss)
        logged = torch.stack([loss.detach(), tokens])
        return loss, tokens.int(), {"lm loss": logged}

    run = model.build_schedule_plan if return_schedule_plan else model
    with timed(bdata=False):
        output = run(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            labels=batch["labels"],
            loss_mask=mask,
        )
    return output, loss_func


def timed(*, bdata: bool) -> Any:
    return STRAGGLER(bdata=bdata) if get_args().log_straggler else contextlib.nullcontext()


def validate(loss: torch.Tensor) -> None:
    args, machine = get_args(), get_rerun_state_machine()

    def is_spike(value: torch.Tensor) -> bool:
        return machine.is_unexpectedly_large(value, threshold=10, context="loss")

    if args.check_for_nan_in_loss_and_grad:
        machine.validate_result(loss, torch.isnan, "NaN")
        machine.validate_result(loss, torch.isinf, "Inf")
    if args.check_for_spiky_loss:
        machine.validate_result(loss, is_spike, "Spiky loss", fatal=False)

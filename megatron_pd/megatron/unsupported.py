"""What of Megatron's features this entry point does not have, each in a sentence before training.

Megatron would end in a traceback, wait for ever, or take the flag and do nothing. What it refuses
itself, with a message of its own, is left to it.

Written against megatron-core 0.19.2.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.errors import UserError
from megatron_pd.megatron import cpu

__all__ = ["check_checkpoint", "check_flags", "check_sequence_counts", "check_splits", "splits_of"]

_OWN_OPTIMIZERS = ("adam", "sgd")
_SPLITS = ("training", "validation", "test")
_OTHER_DATA = "it trains on the tokens of --data-path and on their logit store"
_OTHER_MODEL = "it trains a GPT; Megatron has other scripts for hybrid models"


def check_flags(args: Any, *, distils: bool) -> None:
    """Refuse what the flags ask for in vain.

    Args:
        args: parsed, not yet validated.
        distils: whether there are --pd-* flags.
    Raises:
        UserError: names the flag, the reason and what to do.
    """
    unsupported = {
        "--dataloader-inter-document-masking": (
            args.dataloader_inter_document_masking,
            _OTHER_DATA,
        ),
        "--hybrid-context-parallel": (args.hybrid_context_parallel, _OTHER_DATA),
        "--sft": (args.sft, _OTHER_DATA),
        "--fim-data": (args.fim_data, _OTHER_DATA),
        "--mock-data (with --pd-* flags)": (args.mock_data and distils, _OTHER_DATA),
        "--logits-load-dir": (args.logits_load_dir, _OTHER_DATA),
        "--logits-save-dir": (args.logits_save_dir, "`megatron-pd dump` writes a logit store"),
        "--dataloader-type external": (
            args.dataloader_type == "external",
            "the data loader would have to be written in the script that calls Megatron",
        ),
        "--perform-rl-step": (args.perform_rl_step, "Megatron has train_rl.py for it"),
        "--hybrid-layer-pattern": (
            args.hybrid_layer_pattern or args.hybrid_override_pattern,
            _OTHER_MODEL,
        ),
        "--inprocess-restart": (
            args.inprocess_restart,
            "Megatron would call its training loop again in a process whose arguments it has "
            "thrown away; torchrun --max-restarts starts new processes, which go on from the last "
            "checkpoint",
        ),
    }
    for flag, (given, reason) in unsupported.items():
        if given:
            raise UserError(
                f"{flag} is not supported by megatron_pd.pretrain ({reason}): drop the flag."
            )
    if cpu.is_cpu():
        _check_on_cpu(args)
    if distils or args.pd_lm_only:
        _check_with_distillation(args)
    if args.optimizer not in _OWN_OPTIMIZERS and not _is_installed("emerging_optimizers"):
        raise UserError(
            f"--optimizer {args.optimizer} needs the package emerging-optimizers, which is not "
            "installed: install it, or choose adam or sgd."
        )
    if args.async_save:
        _check_async_save(args)
    for flag, given in {
        "--enable-ft-package": args.enable_ft_package,
        "--non-persistent-ckpt-type local": args.non_persistent_ckpt_type == "local",
    }.items():
        if given and not _is_installed("nvidia_resiliency_ext"):
            raise UserError(
                f"{flag} needs the package nvidia-resiliency-ext, which is not installed: "
                "`pip install nvidia-resiliency-ext`, or drop the flag."
            )


def _check_on_cpu(args: Any) -> None:
    for flag, (given, reason) in {
        "--multi-latent-attention": (
            args.multi_latent_attention,
            "Megatron's attention without Transformer Engine doesn't know it",
        ),
        "--use-megatron-fsdp": (args.use_megatron_fsdp, "gloo lacks its scaled sum"),
        "--use-torch-fsdp2": (args.use_torch_fsdp2, "PyTorch looks for the weights on a GPU"),
        "--optimizer-cpu-offload": (
            args.optimizer_cpu_offload,
            "everything is on the host already",
        ),
    }.items():
        if given:
            raise UserError(f"{flag} needs a GPU ({reason}): drop the flag on this machine.")


def _check_with_distillation(args: Any) -> None:
    modules = args.cuda_graph_modules or []
    if args.cuda_graph_impl == "full_iteration" or "full_iteration" in map(str, modules):
        raise UserError(
            "--cuda-graph-impl full_iteration records one iteration and repeats it, with its α and "
            "without the teacher's rows of the next: use local or transformer_engine, which record "
            "layers."
        )
    if args.defer_embedding_wgrad_compute and args.pd_loss_chunk_tokens:
        raise UserError(
            "--defer-embedding-wgrad-compute keeps the output layer's inputs for later, and "
            "--pd-loss-chunk-tokens takes that layer's gradient at once: drop one of the two."
        )
    for flag, given in {
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
    }.items():
        if given and args.pd_loss_chunk_tokens:
            raise UserError(
                f"{flag} gathers the output layer's weight once, and --pd-loss-chunk-tokens needs "
                "it for every chunk: drop one of the two."
            )


def _check_async_save(args: Any) -> None:
    if args.ckpt_format == "torch":
        raise UserError(
            "--async-save does not exist for --ckpt-format torch: use torch_dist, or drop it."
        )
    is_used = args.use_persistent_ckpt_worker  # else Megatron says that it saves as usual
    if is_used and args.async_strategy == "nvrx" and not _is_installed("nvidia_resiliency_ext"):
        raise UserError(
            "--async-save's default --async-strategy nvrx needs the package nvidia-resiliency-ext, "
            "which is not installed: `pip install nvidia-resiliency-ext`, or give "
            "--async-strategy mcore."
        )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_checkpoint(args: Any, saved: Any) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        args: validated.
        saved: the arguments that the checkpoint in `args.load` has.
    """
    layouts = [
        (run.tensor_model_parallel_size, run.pipeline_model_parallel_size) for run in (saved, args)
    ]
    reshardable = getattr(saved, "dist_ckpt_optim_fully_reshardable", True)
    if (
        layouts[0] != layouts[1]
        and saved.use_distributed_optimizer
        and not reshardable
        and not args.no_load_optim
    ):
        # Megatron names another flag.
        raise UserError(
            f"The checkpoint in {args.load} was saved with tensor and pipeline parallelism of "
            f"{layouts[0][0]} and {layouts[0][1]}, this run has {layouts[1][0]} and "
            f"{layouts[1][1]}, and its distributed optimizer's state fits the first alone: go on "
            "in the old layout until a checkpoint was saved with "
            "--dist-ckpt-optim-fully-reshardable, or give --no-load-optim to go on from the "
            "weights with a new optimizer and learning rate."
        )
    unit = "iters" if args.train_iters else "samples"
    if (
        args.use_checkpoint_opt_param_scheduler
        and saved.lr_decay_style == "WSD"
        and getattr(args, f"lr_wsd_decay_{unit}") is None
    ):
        raise UserError(
            f"--use-checkpoint-opt-param-scheduler: the learning rate of the checkpoint in "
            f"{args.load} is WSD, and Megatron keeps all of it but the decay's length and style: "
            f"give --lr-wsd-decay-{unit} and --lr-wsd-decay-style too."
        )


def check_splits(args: Any) -> None:
    """Refuse a split of a corpus without a token, in which Megatron would look for one for ever,
    and an evaluation without a validation split.

    Args:
        args: validated.
    """
    splits = list(splits_of(args))
    if splits and args.eval_iters and not any(split == "validation" for _, split, *_ in splits):
        # Megatron would look for it when training is done.
        raise UserError(
            f"There is no validation split (--split {args.split}), and --eval-iters "
            f"{args.eval_iters} asks for an evaluation: give --eval-iters 0, or another --split."
        )
    for prefix, split, begin, end in splits:
        if is_object_storage_path(prefix):
            continue
        lengths = MegatronCorpus(prefix).document_lengths
        # As Megatron rounds; most often the first documents already have tokens.
        first, last = (round(share * float(len(lengths))) for share in (begin, end))
        if not (lengths[first:last][:1000].any() or lengths[first:last].any()):
            raise UserError(
                f"The {split} split of {prefix} has no token: it is documents {first} to {last} of "
                f"{len(lengths)} (--split {args.split}). Give another --split, for example "
                "100,0,0 with --eval-iters 0, or a larger corpus."
            )


def check_sequence_counts(args: Any, vocab_size: int) -> None:
    """Refuse counts that differ from a corpus's own, by which Megatron would read other tokens.

    Args:
        vocab_size: the tokenizer's, by which Megatron takes tokens for 16 or 32 bits wide.
    """
    path = args.per_dataset_sequences_path
    if path is None:
        return
    counts = _read_json(path)
    dtype = np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32
    for prefix in dict.fromkeys(prefix for prefix, *_ in splits_of(args)):
        index = IndexedDataset(prefix).index
        found = [index.sequence_count, index.document_count]
        if counts.get(prefix) != found:
            raise UserError(
                f"--per-dataset-sequences-path {path} has {counts.get(prefix)} for {prefix}, whose "
                f"index says {found} (sequences, documents): make the file again."
            )
        if index.dtype != dtype:
            raise UserError(
                f"With --per-dataset-sequences-path Megatron takes the tokens of {prefix} for "
                f"{np.dtype(dtype).name}, as the tokenizer has {vocab_size:,} ids, and they are "
                f"{np.dtype(index.dtype).name}: drop the flag, or preprocess the corpus again."
            )


def _read_json(path: str) -> dict[str, list[int]]:
    try:
        counts = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--per-dataset-sequences-path {path}: {error}.") from error
    if not isinstance(counts, dict):
        raise UserError(
            f"--per-dataset-sequences-path {path} is not a JSON object of corpus prefixes and "
            "their two counts."
        )
    return counts


def splits_of(args: Any) -> Iterator[tuple[str, str, float, float]]:
    """(corpus prefix, name of the split, where it begins and ends as shares of the corpus)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if args.mock_data:
        return
    if blend is not None:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
        for prefix in blend[0]:
            for split, bounds in zip(_SPLITS, matrix, strict=True):
                if bounds is not None:
                    yield (prefix, split, *bounds)
    for split, own in zip(_SPLITS, blend_per_split or (), strict=False):
        for prefix in own[0] if own is not None else ():
            yield prefix, split, 0.0, 1.0

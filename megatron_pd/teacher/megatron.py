"""A Megatron checkpoint as the teacher, on any TP × PP × DP layout.

megatron-pd dump --load CHECKPOINT --data-path PREFIX [--dump-* flags, Megatron flags]
"""

import argparse
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pd.megatron.inference import ForwardOnlyModel, load_model

# isort: split
# Megatron may be imported only after megatron.inference has prepared the device.
from megatron.core import mpu
from megatron.training.checkpointing import get_checkpoint_name

from megatron_pd.data.corpus import MegatronCorpus, store_path_of, training_prefixes
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.data.windows import Batch
from megatron_pd.errors import UserError, if_stopped
from megatron_pd.options import add_options, given_options
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.capture import capture_rows, rows_of_windows, uniforms_of
from megatron_pd.teacher.dump import dump
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.fingerprint import content_fingerprint

__all__ = ["MegatronTeacher", "main"]


def main() -> int:
    """Entry point: dump every corpus of `--data-path`."""
    model = load_model(_add_dump_arguments, check=_check)
    teacher = MegatronTeacher(model)
    config = _config_of(model.args, model.args.seq_length)
    for prefix in training_prefixes(model.args):
        path = model.args.dump_store or store_path_of(prefix)
        with if_stopped("the same command goes on after the rows that were written"):
            dump(teacher, MegatronCorpus(prefix), path, config)
    return 0  # without a word to the other replicas, which may go on for hours


def _add_dump_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="teacher dump")
    group.add_argument(
        "--dump-store",
        default=None,
        help="Store to write, where --data-path is one corpus. Default: <prefix>.pd beside it.",
    )
    add_options(group, DumpConfig, "dump")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be known to be wrong before the model is loaded."""
    _config_of(args, sequence_length=args.seq_length or sys.maxsize)  # the checkpoint may tell it
    prefixes = training_prefixes(args)
    if args.dump_store is not None and len(prefixes) > 1:
        raise UserError(
            f"--dump-store names one store, --data-path {len(prefixes)} corpora: leave it out, and "
            "each gets <prefix>.pd, or dump them one by one."
        )
    for prefix in prefixes:
        MegatronCorpus(prefix)


def _config_of(args: argparse.Namespace, sequence_length: int) -> DumpConfig:
    return DumpConfig(
        sequence_length=sequence_length,
        batch_size=args.micro_batch_size,
        seed=args.seed,
        **given_options(args, DumpConfig, "dump"),
    )


class MegatronTeacher:
    """A loaded checkpoint (`Teacher`)."""

    def __init__(self, model: ForwardOnlyModel) -> None:
        args = model.args
        self._model = model
        self.vocab_size: int = model.tokenizer.vocab_size
        self.length_multiple: int = args.tensor_model_parallel_size  # for sequence parallelism
        self.replica, self.replicas = model.replica, model.replicas
        self.writes = model.writes
        self.identity: Mapping[str, Any] = {
            "teacher": os.path.abspath(args.load),
            "iteration": args.iteration,
            "fingerprint": _fingerprint(args),
            "precision": str(args.params_dtype).removeprefix("torch."),
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
        }

    def run(self, batch: Batch, config: DumpConfig) -> TeacherRows | None:
        """See `Teacher.run`."""
        selection: dict[str, Any]
        if config.sampled is None:
            selection = {"top_p": config.top_p, "top_k": config.top_k}
        else:
            uniforms = uniforms_of(batch, config.seed, config.sampled)
            selection = {"uniforms": uniforms.to(torch.cuda.current_device())}
        capture = functools.partial(
            capture_rows,
            **selection,
            vocab_size=self.vocab_size,
            tp_group=self._model.tp_group,
            statistics=config.statistics,
        )
        captured = self._model.run(batch, capture)
        if not self.writes:
            return None
        try:
            return rows_of_windows(batch, captured)
        except UserError as error:
            raise UserError(f"{self.identity['teacher']}: {error}") from None

    def share(self, values: np.ndarray | None) -> np.ndarray:
        """See `Teacher.share`."""
        group = mpu.get_model_parallel_group()
        everyone: list[np.ndarray | None] = [None] * group.size()
        torch.distributed.all_gather_object(everyone, values if self.writes else None, group=group)
        return next(found for found in everyone if found is not None)


def _fingerprint(args: argparse.Namespace) -> str:
    """Of the checkpoint that was loaded; read once and told to all ranks."""
    found: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        folder = Path(get_checkpoint_name(args.load, args.iteration, return_base_dir=True))
        if not folder.is_dir():  # a converted checkpoint, which has no iteration
            folder = Path(get_checkpoint_name(args.load, 0, release=True, return_base_dir=True))
        found = [content_fingerprint(folder)]
    torch.distributed.broadcast_object_list(found, src=0)
    assert found[0] is not None
    return found[0]

"""A Megatron checkpoint as the teacher, on any TP × PP × DP layout.

megatron-pd dump --load CHECKPOINT --data-path PREFIX [--dump-* flags, Megatron flags]
"""

import argparse
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

from megatron_pd.data.corpus import store_path_of, training_prefixes
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.data.windows import Batch
from megatron_pd.errors import UserError
from megatron_pd.options import given_options
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.capture import capture_for, rows_of_windows
from megatron_pd.teacher.command import add_dump_arguments, checked_corpora, dump_corpora
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.fingerprint import content_fingerprint
from megatron_pd.teacher.packed import check_packed, dump_packed

__all__ = ["MegatronTeacher", "main"]


def main() -> int:
    """Entry point: dump every corpus of `--data-path`."""
    model = load_model(_add_dump_arguments, check=_check)
    teacher = MegatronTeacher(model)
    config = _config_of(model.args, model.args.seq_length)
    prefixes = training_prefixes(model.args)
    if config.context == "packed":
        prefixes = list(dict.fromkeys(prefixes))
        stores = {prefix: model.args.dump_store or store_path_of(prefix) for prefix in prefixes}
        dump_packed(teacher, {p: Path(store) for p, store in stores.items()}, model.args, config)
    else:
        dump_corpora(teacher, prefixes, model.args.dump_store, config)
    return 0  # without a word to the other replicas, which may go on for hours


def _add_dump_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add_dump_arguments(parser).add_argument(
        "--hf-model",
        help="A Hugging Face model as the teacher, in place of --load; it has flags of its own: "
        "megatron-pd dump --hf-model FOLDER --help.",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be known to be wrong before the model is loaded."""
    config = _config_of(args, args.seq_length or sys.maxsize)  # the checkpoint may tell it
    if config.context == "packed":
        check_packed(args)
    checked_corpora(training_prefixes(args), args.dump_store)


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
        capture = capture_for(
            batch,
            config,
            vocab_size=self.vocab_size,
            device=torch.cuda.current_device(),
            tp_group=self._model.tp_group,
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

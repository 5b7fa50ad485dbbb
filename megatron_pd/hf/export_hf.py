"""A torch_dist checkpoint of any parallel layout → a Hugging Face folder.

Only the model's own weights are read, a layer's tensor at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_pd.errors import UserError
from megatron_pd.hf.architectures import EMBEDDING, TensorRow
from megatron_pd.hf.checkpoint import TorchDistCheckpoint, iteration_folder
from megatron_pd.hf.config import ModelConfig, config_of_arguments
from megatron_pd.hf.folders import whole_folder
from megatron_pd.hf.layouts import split
from megatron_pd.hf.tokenizer import CONFIG, Companions, companions_of
from megatron_pd.hf.weights import DTYPES, write_weights

__all__ = ["Exported", "export_hf", "planned_tensors"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    config: ModelConfig
    parameters: int
    dtype: torch.dtype
    companions: Companions


def export_hf(load: Path, output: Path, tokenizer: Path | None = None) -> Exported:
    """Convert the last iteration of a checkpoint; `output` is new.

    Args:
        tokenizer: a folder or sentencepiece model in place of the checkpoint's own.
    Raises:
        UserError: a model that no Hugging Face architecture is, a tokenizer that is not found, or
            a checkpoint that is not whole, damaged, or holds what no checkpoint needs.
    """
    checkpoint = TorchDistCheckpoint(iteration_folder(load))
    args = checkpoint.common().get("args")
    if args is None:
        raise UserError(f"--load {load} has no arguments of Megatron's: what model it is is lost.")
    name = f"--load {load}"
    if EMBEDDING.megatron not in checkpoint:
        raise UserError(f"{name} has no tensor {EMBEDDING.megatron}: it is no GPT of Megatron's.")
    companions = companions_of(args, load, tokenizer, checkpoint.shape(EMBEDDING.megatron)[0])
    config = config_of_arguments(args, companions.vocab_size, companions.config, name)
    _check_tensors(config, checkpoint)
    planned = planned_tensors(config, checkpoint)
    dtype = checkpoint.dtype(EMBEDDING.megatron)
    sizes = [torch.Size(shape).numel() for _, shape, _ in planned]
    with (
        whole_folder(output.absolute(), "--output") as unfinished,
        tqdm(
            total=sum(
                size * kept.itemsize for size, (_, _, kept) in zip(sizes, planned, strict=True)
            ),
            desc="export",
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        config_json = config.json(str(dtype).removeprefix("torch."), companions.config)
        (unfinished / CONFIG).write_text(json.dumps(config_json, indent=2) + "\n")
        companions.write(unfinished)
        write_weights(
            unfinished,
            planned,
            _tensors(config, checkpoint),
            progress=bar.update,
        )
    return Exported(config, sum(sizes), dtype, companions)


def planned_tensors(
    config: ModelConfig, checkpoint: TorchDistCheckpoint
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor of the folder, in the order that it is written in."""
    return [
        (name, shape, checkpoint.dtype(row.megatron))
        for row, layer in _places(config)
        for name, shape in zip(row.names(layer), config.shapes_of(row), strict=True)
    ]


def _tensors(config: ModelConfig, checkpoint: TorchDistCheckpoint) -> Iterator[torch.Tensor]:
    for row, layer in _places(config):
        shape = config.joined_shape_of(row)
        start = (0,) * len(shape)
        if row.per_layer:
            tensor = checkpoint.read(row.megatron, (layer, *start), (1, *shape))[0]
        else:  # padding lies behind what is read
            tensor = checkpoint.read(row.megatron, start, shape)
        rows = [part[0] for part in config.shapes_of(row)]
        yield from split(tensor, rows, config.groups_of(row))


def _places(config: ModelConfig) -> Iterator[tuple[TensorRow, int]]:
    """Each row once a layer, in the order in which a model uses them."""
    by_layer = [row for row in config.tensors if row.per_layer]
    yield EMBEDDING, 0
    for layer in range(config.layers):
        for row in by_layer:
            yield row, layer
    for row in config.tensors:
        if row not in by_layer and row is not EMBEDDING:
            yield row, 0


def _check_tensors(config: ModelConfig, checkpoint: TorchDistCheckpoint) -> None:
    """The checkpoint has the tables' tensors with their shapes, and no others."""
    folder = checkpoint.folder
    for row in config.tensors:
        name = row.megatron
        if name not in checkpoint:
            raise UserError(
                f"{folder} has no tensor {name}, which becomes {row.names(0)[0]} of a "
                f"{config.architecture.class_name}: it was saved in another layout than Megatron's "
                "default, or is another model."
            )
        expected = config.joined_shape_of(row)
        if row.per_layer:
            expected = (config.layers, *expected)
        found = checkpoint.shape(name)
        if row.padded and found[:1] >= expected[:1]:
            found = (expected[0], *found[1:])
        if found != expected:
            raise UserError(
                f"{folder}: {name} has the shape {list(checkpoint.shape(name))}, and by the "
                f"checkpoint's arguments it is {list(expected)}."
            )
        if checkpoint.dtype(name) not in DTYPES.values():
            raise UserError(
                f"{folder}: {name} is {checkpoint.dtype(name)}, expected float32, bfloat16 or "
                "float16."
            )
    known = {row.megatron for row in config.tensors}
    for name in checkpoint.tensors:
        if name not in known:
            raise UserError(
                f"{folder} has a tensor {name}, which has no place in a "
                f"{config.architecture.class_name} and would be lost."
            )

"""A Hugging Face folder → a checkpoint for Megatron's `--load`.

    CKPT/latest_checkpointed_iteration.txt, CKPT/release/…     see `checkpoint`
    CKPT/tokenizer/       the folder's tokenizer, generation config and config.json

The files' headers are checked against the architecture's table before anything is written.
"""

import functools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_pd.errors import UserError
from megatron_pd.hf.architectures import EMBEDDING, OUTPUT
from megatron_pd.hf.checkpoint import TOKENIZER_FOLDER, Chunk, write_checkpoint
from megatron_pd.hf.config import ModelConfig, read_config
from megatron_pd.hf.folders import whole_folder
from megatron_pd.hf.layouts import join
from megatron_pd.hf.tokenizer import CONFIG, HUGGING_FACE, copy_companions, has_tokenizer
from megatron_pd.hf.weights import DTYPES, StoredTensor, WeightsFolder, read_json

# isort: split
# Megatron may be imported only after hf.checkpoint has prepared the device.
from megatron_pd.megatron.launch import default_args

__all__ = ["Imported", "import_hf"]

_STATELESS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that ask for extra state, with either of Megatron's layer specs."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    config: ModelConfig
    parameters: int
    dtype: torch.dtype
    tokenizer: Path | None


def import_hf(folder: Path, save: Path) -> Imported:
    """Convert a model; `save` is new.

    The tensors are read, laid out and written one by one: memory is needed for the largest (of a
    layer, or the embeddings) a few times over.

    Raises:
        UserError: a field of config.json or a tensor that Megatron can't express, or files that are
            damaged or don't belong together.
    """
    raw = read_json(folder / CONFIG)
    config = read_config(raw, str(folder / CONFIG))
    weights = WeightsFolder(folder)
    _check_tensors(config, weights)
    chunks = list(_chunks(config, weights))
    target = Path(save).absolute()
    tokenizer = target / TOKENIZER_FOLDER if has_tokenizer(folder) else None
    args = _args(config, tokenizer)
    with (
        whole_folder(target, "--save") as unfinished,
        tqdm(
            total=sum(torch.Size(chunk.shape).numel() * chunk.dtype.itemsize for chunk in chunks),
            desc="import",
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        companions = unfinished / TOKENIZER_FOLDER
        companions.mkdir()
        copy_companions(folder, companions)
        (companions / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        write_checkpoint(
            unfinished,
            chunks,
            {
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": 0,
                "content_metadata": {"singleton_local_shards": False},
            },
            _extra_states(config.layers),
            bar.update,
        )
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in weights.tensors.values())
    return Imported(config, parameters, chunks[0].dtype, tokenizer)


def _args(config: ModelConfig, tokenizer: Path | None) -> Namespace:
    """Megatron's arguments as a run of this model would have saved them."""
    args = default_args()
    vars(args).update(
        config.arguments(),
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    if tokenizer is not None:
        args.tokenizer_type, args.tokenizer_model = HUGGING_FACE, str(tokenizer)
    return args


def _extra_states(layers: int) -> Iterator[str]:
    for module in _STATELESS:
        for layer in range(layers):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _check_tensors(config: ModelConfig, weights: WeightsFolder) -> None:
    """The tables' tensors are there, with their shapes and a dtype per row, and no others."""
    known: set[str] = set()
    for row in config.tensors:
        first = None
        for layer in config.layers_of(row):
            for name, shape in zip(row.names(layer), config.shapes_of(row), strict=True):
                known.add(name)
                stored = _checked(weights, name, shape, config)
                first = first or (name, stored.dtype)
                if stored.dtype != first[1]:
                    raise UserError(
                        f"{stored.file}: {name} is {stored.dtype} and {first[0]} {first[1]}, "
                        "which Megatron keeps in one tensor: save the model in one dtype first."
                    )
    unknown = [
        name
        for name in weights.tensors
        if name not in known and not name.endswith(".rotary_emb.inv_freq")
    ]
    if config.tied and unknown == OUTPUT.names(0):
        _check_tied(weights)
    elif unknown:
        raise UserError(
            f"{weights.tensors[unknown[0]].file}: {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3:,} more' if len(unknown) > 3 else ''} have no place in a "
            f"{config.architecture.class_name} as {CONFIG} has it, and would be lost."
        )


def _checked(
    weights: WeightsFolder, name: str, shape: tuple[int, ...], config: ModelConfig
) -> StoredTensor:
    stored = weights.tensors.get(name)
    if stored is None:
        raise UserError(
            f"{weights.folder} has no tensor {name}, which a {config.architecture.class_name} of "
            f"{config.layers} layers has."
        )
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: {name} has the shape {list(stored.shape)}, and by {CONFIG} it is "
            f"{list(shape)}."
        )
    if stored.dtype not in DTYPES:
        raise UserError(
            f"{stored.file}: {name} is {stored.dtype}, expected one of {', '.join(DTYPES)}: save "
            "the model in one of these first."
        )
    return stored


def _check_tied(weights: WeightsFolder) -> None:
    (embedding,), (output,) = EMBEDDING.names(0), OUTPUT.names(0)
    if not torch.equal(weights.read(embedding), weights.read(output)):
        raise UserError(
            f"{weights.tensors[output].file}: {output} differs from {embedding}, and by {CONFIG} "
            "(tie_word_embeddings) they are one."
        )


def _chunks(config: ModelConfig, weights: WeightsFolder) -> Iterator[Chunk]:
    """What the checkpoint is written of: a layer's tensor each."""
    for row in config.tensors:
        own = config.joined_shape_of(row)
        if row.padded:
            own = (config.padded_vocab_size, *own[1:])
        start = tuple(0 for _ in own)
        dtype = DTYPES[weights.tensors[row.names(0)[0]].dtype]
        for layer in config.layers_of(row):
            whole, offset, shape = own, start, own
            if row.per_layer:
                whole, offset, shape = (config.layers, *own), (layer, *start), (1, *own)
            load = functools.partial(_load, weights, row.names(layer), config.groups_of(row), shape)
            yield Chunk(row.megatron, whole, offset, shape, dtype, load)


def _load(
    weights: WeightsFolder, names: Sequence[str], groups: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """A checkpoint's tensor, made of those in the folder; rows that no token has are 0."""
    tensor = join([weights.read(name) for name in names], groups)
    if tensor.numel() == torch.Size(shape).numel():
        return tensor.reshape(shape)
    padded = tensor.new_zeros(shape)
    padded[: len(tensor)] = tensor
    return padded

"""A torch_dist checkpoint of Megatron's, written and read one tensor at a time, without Megatron's
model and without processes.

    CKPT/latest_checkpointed_iteration.txt        an iteration, or `release` for a converted model
    CKPT/release/metadata.json                    which format it is
    CKPT/release/.metadata                        a pickle: the tensors' shapes, dtypes and places
    CKPT/release/*.distcp                         the tensors, and what Megatron keeps beside them
    CKPT/tokenizer/                               of an imported model: its companions

Torch's own reader unpickles whatever `.metadata` holds; the one here knows the classes that belong
there. Written against torch 2.11 and megatron-core 0.19.2.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_pd.errors import UserError, reporting_errors
from megatron_pd.hf.weights import read_json
from megatron_pd.megatron import cpu

with reporting_errors():
    cpu.install()  # before Megatron is imported

from megatron.core.safe_globals import SAFE_GLOBALS

__all__ = [
    "TOKENIZER_FOLDER",
    "Chunk",
    "TorchDistCheckpoint",
    "iteration_folder",
    "write_checkpoint",
]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
TOKENIZER_FOLDER = "tokenizer"
_COMMON = "common_state/shard_0_1"
_LEGACY_COMMON = "common.pt"  # of Megatron before 0.17


@dataclass(frozen=True)
class Chunk:
    """A part of a checkpoint's tensor, computed when it is written."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def write_checkpoint(
    folder: Path,
    chunks: Sequence[Chunk],
    common: Mapping[str, Any],
    empty: Iterable[str],
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write a checkpoint that Megatron loads with `--load FOLDER`.

    Args:
        common: what Megatron keeps beside the tensors, such as `args`.
        empty: names of objects that Megatron expects and that say nothing: layers' extra state.
        progress: is given the bytes of each chunk that was written.
    """
    target = folder / RELEASE
    target.mkdir()
    nothing = _pickled([None])
    objects = {_COMMON: _pickled([dict(common)]), **dict.fromkeys(empty, nothing)}
    # What torch's `save` does for one process, less that it makes exceptions of its own of any
    # that end it, Ctrl-C among them.
    writer = FileSystemWriter(target, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan([_plan(chunks, objects)])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(plan, _LazyPlanner(chunks, objects, progress)).wait()
    writer.finish(metadata, [written])
    (target / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / TRACKER).write_text(RELEASE)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _plan(chunks: Sequence[Chunk], objects: Mapping[str, bytes]) -> SavePlan:
    tensors = [
        WriteItem(
            MetadataIndex(chunk.name, torch.Size(chunk.offset)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)),
                properties=TensorProperties(dtype=chunk.dtype),
                size=torch.Size(chunk.global_shape),
            ),
        )
        for chunk in chunks
    ]
    return SavePlan(
        [*(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects), *tensors]
    )


class _LazyPlanner(DefaultSavePlanner):
    """Gives torch's writer a chunk when it comes to it, where the default planner has them all."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        objects: Mapping[str, bytes],
        progress: Callable[[int], object],
    ) -> None:
        super().__init__()
        self._chunks = {(chunk.name, chunk.offset): chunk for chunk in chunks}
        self._objects = objects
        self._progress = progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[index.fqn])
        assert index.offset is not None
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        tensor = chunk.load()
        assert tuple(tensor.shape) == chunk.shape and tensor.dtype == chunk.dtype, index
        self._progress(tensor.nbytes)
        return tensor


# ------------------------------------------------------------------------------------ reading


def iteration_folder(load: Path) -> Path:
    """The folder of a checkpoint's last iteration.

    Raises:
        UserError: there is no whole torch_dist checkpoint.
    """
    tracker = load / TRACKER
    try:
        text = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--load {load} has no {TRACKER}: give the folder that a model was saved to with "
            "--save."
        ) from None
    if text != RELEASE and not text.isdecimal():
        raise UserError(f"{tracker} has {text[:40]!r}, expected an iteration or `{RELEASE}`.")
    folder = load / (RELEASE if text == RELEASE else f"iter_{int(text):07}")
    for file in ("metadata.json", ".metadata"):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}: it is no whole checkpoint of Megatron's format "
                "torch_dist, its default (--ckpt-format)."
            )
    backend = read_json(folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(f"{folder / 'metadata.json'}: the format is {backend!r}, not torch_dist.")
    return folder


class TorchDistCheckpoint:
    """An iteration's folder. Needs no processes, and reads what is asked for alone."""

    def __init__(self, folder: Path) -> None:
        """Read the checkpoint's metadata.

        Raises:
            UserError: it is damaged, or holds something that no checkpoint of Megatron's needs.
        """
        self.folder = folder
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds {type(metadata).__name__}")
            entries = metadata.state_dict_metadata.items()
            self._tensors = {
                name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)
            }
            self._objects = {
                name for name, entry in entries if isinstance(entry, BytesStorageMetadata)
            }
            for place in metadata.storage_data.values():
                if Path(place.relative_path).name != place.relative_path:
                    raise ValueError(f"it names the file {place.relative_path!r}")
        except _NOT_OURS as error:
            raise UserError(f"{path} is not sound ({_first_line(error)}).") from error
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def tensors(self) -> list[str]:
        """Names of the model's tensors."""
        return [name for name in self._tensors if not _is_training_state(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A region of a tensor, whatever parts it was saved in.

        Raises:
            UserError: parts are missing, or a file is damaged.
        """
        entry = self._tensors[name]
        region = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        try:
            items = create_read_items_for_chunk_list(name, entry, [region])
            found = sum(torch.Size(item.lengths).numel() for item in items)
            if found != torch.Size(shape).numel():
                raise ValueError(f"{found:,} of {torch.Size(shape).numel():,} values are there")
            tensor = torch.empty(shape, dtype=entry.properties.dtype)
            self._reader.read_data(LoadPlan(items), _RegionPlanner(tensor))
        except _NOT_OURS as error:
            raise UserError(
                f"{self.folder}: {name} cannot be read ({_first_line(error)}): the checkpoint is "
                "not whole or damaged."
            ) from error
        return tensor

    def common(self) -> dict[str, Any]:
        """What Megatron keeps beside the tensors, such as `args`.

        Raises:
            UserError: it is missing or damaged, or holds objects that no checkpoint needs.
        """
        legacy = self.folder / _LEGACY_COMMON
        place = legacy if legacy.exists() else self.folder
        try:
            # Nothing is made but tensors, plain values and the classes that Megatron lists.
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                if legacy.exists():
                    state = torch.load(legacy, map_location="cpu", weights_only=True)
                else:
                    state = torch.load(self._bytes(_COMMON), map_location="cpu", weights_only=True)
                    state = state[0]
            if not isinstance(state, dict):
                raise TypeError(f"it holds {type(state).__name__}")
        except _NOT_OURS as error:
            raise UserError(
                f"{place}: the arguments of the model cannot be read ({_first_line(error)})."
            ) from error
        return state

    def _bytes(self, name: str) -> io.BytesIO:
        if name not in self._objects:
            raise KeyError(f"it has no {name}")
        index = MetadataIndex(name)
        item = ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=index,
            dest_offsets=torch.Size((0,)),
            storage_index=index,
            storage_offsets=torch.Size((0,)),
            lengths=torch.Size((0,)),
        )
        planner = _BytesPlanner()
        self._reader.read_data(LoadPlan([item]), planner)
        return planner.found


def _is_training_state(name: str) -> bool:
    return name.startswith(("optimizer.", "rng_state", "rerun_state_machine"))


def _first_line(error: BaseException) -> str:
    """torch explains at length how to read what it refuses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), None)
    return (named or next(iter(lines), type(error).__name__))[:300]


class _RegionPlanner(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


class _BytesPlanner(DefaultLoadPlanner):
    """Keeps the bytes of the one object that is read."""

    found: io.BytesIO

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.found = value


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what torch and Megatron put into `.metadata`, and refuses all else."""

    _KNOWN = frozenset(
        {
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            # Of checkpoints of megatron-core 0.15 and before.
            ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
            ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it would run {module}.{name}, which is refused")
        return super().find_class(module, name)


# What damaged or hostile bytes make of pickle, torch and zip.
_NOT_OURS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

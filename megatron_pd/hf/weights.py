"""The safetensors of a Hugging Face folder, read and written one tensor at a time.

File: 8 bytes, the header's length; the header, JSON; the tensors, one after another.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_pd.errors import UserError

__all__ = ["DTYPES", "StoredTensor", "WeightsFolder", "read_json", "write_weights"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those of weights, by their names in a header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILE_BYTES = 5_000_000_000
_JSON_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightsFolder:
    """The tensors of `model.safetensors`, or of the files that its index names."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            UserError: there are none, or one is no sound safetensors file.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        """By name."""
        if (folder / INDEX).exists():
            placed = self._index()
            files = sorted(set(placed.values()))
        elif (folder / SINGLE).exists():
            placed, files = {}, [SINGLE]
        else:
            raise UserError(
                f"{folder} has no {SINGLE} and no {INDEX}: weights in other formats, pickles among "
                "them, are not read. Write the folder anew by transformers' save_pretrained."
            )
        for file in files:
            for name, tensor in _header(folder / file).items():
                if placed and placed.get(name) != file:
                    raise UserError(
                        f"{folder / file} has a tensor {name}, which {INDEX} has "
                        f"{'in ' + placed[name] if name in placed else 'not'}: the folder's files "
                        "are of different models, or a download broke."
                    )
                self.tensors[name] = tensor
        for name in placed.keys() - self.tensors.keys():
            raise UserError(f"{folder / placed[name]} lacks {name}, which {INDEX} has there.")

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Its file is open meanwhile only, so that no other's bytes stay in memory."""
        from safetensors import safe_open

        stored = self.tensors[name]
        with _naming(stored.file), safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(name)

    def _index(self) -> dict[str, str]:
        index = read_json(self.folder / INDEX)
        placed = index.get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise UserError(f"{self.folder / INDEX} has no weight_map of tensors and their files.")
        for name, file in placed.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise UserError(
                    f"{self.folder / INDEX} has {name} in {file!r}, which is no file of this "
                    "folder: an index names files beside it."
                )
            if not (self.folder / file).is_file():
                raise UserError(
                    f"{self.folder / file} does not exist, and {INDEX} has {name} there: a "
                    "download is not complete."
                )
        return placed


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(
            "Hugging Face folders need the package safetensors: pip install 'megatron-pd[hf]'."
        ) from error
    with _naming(path), safe_open(path, framework="pt") as file:
        return {
            name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
            for name in file.keys()  # noqa: SIM118
            for part in [file.get_slice(name)]
        }


class _naming:
    """What safetensors finds wrong becomes a UserError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            raise UserError(
                f"{self._path} is no sound safetensors file ({error}): it is cut short or damaged; "
                "copy or download it again."
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    try:
        size = path.stat().st_size
        if size > _JSON_BYTES:
            raise UserError(f"{path} has {size:,} bytes, too many for a description of a model.")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a Hugging Face model's folder.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object, but {type(found).__name__}.")
    return found


# ------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class _Planned:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    folder: Path,
    planned: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
    tensors: Iterable[torch.Tensor],
    *,
    file_bytes: int = _FILE_BYTES,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write tensors in files of at most `file_bytes` (a larger tensor has one of its own).

    Args:
        planned: (name, shape, dtype) of each.
        tensors: the same ones in this order, each asked for when it is written.
        progress: is given the bytes that were written.
    """
    files = list(_files([_Planned(*entry) for entry in planned], file_bytes))
    names = [
        SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    source = iter(tensors)
    for name, entries in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_encoded_header(entries))
            for entry in entries:
                tensor = next(source)
                assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                progress(entry.bytes)
            file.flush()
            os.fsync(file.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.bytes for part in files for entry in part)},
            "weight_map": {
                entry.name: name for name, part in zip(names, files, strict=True) for entry in part
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _files(planned: Iterable[_Planned], file_bytes: int) -> Iterator[list[_Planned]]:
    entries: list[_Planned] = []
    size = 0
    for entry in planned:
        if entries and size + entry.bytes > file_bytes:
            yield entries
            entries, size = [], 0
        entries.append(entry)
        size += entry.bytes
    yield entries


def _encoded_header(entries: Sequence[_Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(encoded)) + encoded

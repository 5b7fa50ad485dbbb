"""Megatron's `.idx`, which says where each document lies in its `.bin`.

As megatron/core/datasets/indexed_dataset.py of megatron-core 0.19.2 has it, little-endian:

    magic "MMIDIDX\\0\\0" · uint64 version 1 · uint8 code of the tokens' dtype
    uint64 sequences S · uint64 documents + 1 · int32 lengths [S] in tokens · int64 positions [S] in
    bytes · int64 first sequence of every document, and S

(and, for several modalities, int8 modes [S], which nothing here reads). Megatron's own reader can't
be had without torch, whose import takes longer than most of what reads a corpus here.
"""

import mmap
import os
import struct
from typing import NamedTuple

import numpy as np

from megatron_pd.errors import UserError, naming

__all__ = ["HEADER", "CorpusIndex", "bin_path", "idx_path", "pack_header"]

HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7: floating-point


def bin_path(prefix: str) -> str:
    return f"{prefix}.bin"


def idx_path(prefix: str) -> str:
    return f"{prefix}.idx"


def pack_header(dtype: np.dtype, sequences: int) -> bytes:
    """The header of an index in which every sequence is a document."""
    code = next(code for code, name in _CODES.items() if np.dtype(name) == dtype)
    return HEADER.pack(_MAGIC, _VERSION, code, sequences, sequences + 1)


class CorpusIndex(NamedTuple):
    """The sequences of a corpus.

    Attributes:
        dtype: of the tokens.
        lengths: int32 [S] in tokens, mapped.
        positions: int64 [S] of the first one in the `.bin`, in bytes, mapped.
    """

    dtype: np.dtype
    lengths: np.ndarray
    positions: np.ndarray

    @classmethod
    def open(cls, path: str) -> "CorpusIndex":
        """
        Raises:
            UserError: it is no index, or was cut short.
            OSError: it can't be read; `filename` is `path`.
        """
        with naming(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER.size)
            if 0 < len(header) < HEADER.size and _MAGIC.startswith(header[: len(_MAGIC)]):
                raise UserError(
                    f"{path}: {size:,} bytes, fewer than an index's header has: it was cut short. "
                    "Copy it again."
                )
            if len(header) < HEADER.size or not header.startswith(_MAGIC):
                raise UserError(
                    f"{path} is no index of a Megatron corpus (it does not begin with MMIDIDX): "
                    "give the prefix of a .bin/.idx pair, as `megatron-pd preprocess` makes it."
                )
            _, version, code, sequences, _ = HEADER.unpack(header)
            if version != _VERSION or code not in _CODES:
                raise UserError(
                    f"{path} is an index of version {version} with tokens of type {code}; known "
                    f"are version {_VERSION} and integers ({', '.join(map(str, _CODES))})."
                )
            if size < HEADER.size + 12 * sequences:
                raise UserError(
                    f"{path}: {size:,} bytes, too few for the {sequences:,} documents that its "
                    "header tells: it was cut short. Copy it again."
                )
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
        positions = np.frombuffer(data, "<i8", sequences, HEADER.size + lengths.nbytes)
        return cls(np.dtype(_CODES[code]), lengths, positions)

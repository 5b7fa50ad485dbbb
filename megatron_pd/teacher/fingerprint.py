"""A fingerprint of a checkpoint's content, in seconds whatever its size."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["content_fingerprint"]

_BLOCK_BYTES = 1 << 16
_BLOCKS = 16


def content_fingerprint(folder: Path, patterns: Sequence[str] = ("**/*",)) -> str:
    """A hash of a folder's files: their names, sizes, and 16 blocks of 64 KiB spread over each.

    Retraining changes every weight, so it shows in any block; small files are read whole. The same
    files elsewhere have the same fingerprint.

    Args:
        patterns: the files that count, as for `Path.glob`.
    Returns:
        16 hexadecimal digits.
    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(path for path in found if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                offset = block * (size - _BLOCK_BYTES) // (_BLOCKS - 1)
                digest.update(os.pread(file.fileno(), _BLOCK_BYTES, offset))
    return digest.hexdigest()

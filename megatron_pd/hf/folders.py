"""Folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_pd.errors import UserError, naming
from megatron_pd.store.files import fsync_directory

__all__ = ["whole_folder"]


@contextlib.contextmanager
def whole_folder(target: Path, flag: str) -> Iterator[Path]:
    """Yields the folder `TARGET.unfinished`, which becomes `target` at the end of the body.

    What a killed process left there is removed first.

    Raises:
        UserError: `target` has something in it, or another process writes it.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{flag} {target} exists: name a new folder, or remove that one.")
    unfinished = target.with_name(f"{target.name}.unfinished")
    with naming(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{flag} {target} is being written by another process: wait for it, or name "
                    "another folder."
                ) from None
            _empty(unfinished)
            try:
                yield unfinished
                fsync_directory(unfinished)
                os.rename(unfinished, target)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            fsync_directory(target.parent)
        finally:
            os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

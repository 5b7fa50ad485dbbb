"""File operations of the writer: append-only, locked, made durable, published atomically."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from megatron_pd.store.format import fsync_directory
from megatron_pd.store.rows import StoreError

__all__ = ["AppendFile", "publish_once"]

_MENDS = {
    errno.ENOSPC: "the disk is full: free space and start again, what was flushed is kept",
    errno.EDQUOT: "the disk quota is used up: free space and start again, what was flushed is kept",
    errno.EROFS: "the file system is read-only: choose another path or mount it writable",
    errno.EACCES: "permission denied: choose a path that this user may write",
}


def write_error(path: Path, error: OSError) -> StoreError:
    """A StoreError that says what stopped a write and how to go on."""
    mend = _MENDS.get(error.errno or 0, f"{error.strerror}; start again once that is mended")
    return StoreError(f"{path}: cannot write the logit store: {mend}.")


class AppendFile:
    """A file that one process appends to; a failed append leaves no trace behind `end`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = _open_locked(path)
            self.end = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise write_error(path, error) from error

    def append(self, data: bytes) -> int:
        """Appends all of `data`; returns the offset where it starts."""
        start = self.end
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, self.end)
                self.end += written
                view = view[written:]
        except OSError as error:
            self.end = start
            raise write_error(self.path, error) from error
        return start

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def truncate(self, end: int) -> None:
        os.ftruncate(self._descriptor, end)
        self.end = end

    def sync(self) -> None:
        """Returns once everything appended is on the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error

    def publish(self, target: Path) -> None:
        """Gives the whole, durable file its final name in one step."""
        try:
            os.ftruncate(self._descriptor, self.end)
            os.fsync(self._descriptor)
            os.rename(self.path, target)
            fsync_directory(target.parent)
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        os.close(self._descriptor)


def publish_once(path: Path, data: bytes) -> None:
    """Creates `path` with `data` unless it exists; no reader ever sees a part of it."""
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        file = AppendFile(scratch)
        try:
            file.truncate(0)
            file.append(data)
            file.sync()
            _link_or_rename(scratch, path)
            fsync_directory(path.parent)
        finally:
            file.close()
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def _link_or_rename(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: all writers publish the same bytes
        os.rename(source, target)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(
                f"{path}: another process is writing this shard. "
                "Wait for it, or give each writer its own range of documents."
            ) from None
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last writer published it between our open and our lock


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False

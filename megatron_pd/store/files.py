"""File operations of the writer: append-only, locked, made durable, published atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_pd.store.types import ShardInUseError, StoreError

__all__ = ["AppendFile", "fsync_directory", "publish_once", "write_error"]

_FIXES = {
    errno.ENOSPC: "the disk is full: free space and start again, what was flushed is kept",
    errno.EDQUOT: "the disk quota is used up: free space and start again, what was flushed is kept",
    errno.EROFS: "the file system is read-only: choose another path or mount it writable",
    errno.EACCES: "permission denied: choose a path that this user may write",
}


def write_error(path: Path, error: OSError) -> StoreError:
    """A StoreError that says what stopped a write and how to go on."""
    fix = _FIXES.get(error.errno or 0, f"{error.strerror}; start again once that is fixed")
    return StoreError(f"{path}: cannot write the logit store: {fix}.")


class AppendFile:
    """A file that one process appends to.

    A failed append or sync cuts the file back to what was durable before and ends its use: rows
    that the disk may have lost, though the page cache still shows them, are never counted on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = _open_locked(path)
        except OSError as error:
            raise write_error(path, error) from error
        self.end = self._durable = os.fstat(self._descriptor).st_size
        with self._failing_for_good():
            fsync_directory(path.parent)

    def append(self, data: bytes) -> int:
        """Appends all of `data`; returns the offset where it starts."""
        start = self.end
        view = memoryview(data)
        with self._failing_for_good():
            while view:
                written = os.pwrite(self._descriptor, view, self.end)
                self.end += written
                view = view[written:]
        return start

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def truncate(self, end: int) -> None:
        """Drops what lies behind `end`."""
        with self._failing_for_good():
            os.ftruncate(self._descriptor, end)
            self.end = end
            self._durable = min(self._durable, end)

    def sync(self) -> None:
        """Returns once everything appended is on the disk."""
        with self._failing_for_good():
            os.fsync(self._descriptor)
            self._durable = self.end

    def publish(self, target: Path) -> None:
        """Gives the whole, durable file its final name in one step."""
        self.sync()
        with self._failing_for_good():
            os.rename(self.path, target)
            fsync_directory(target.parent)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._durable)
            self.close()
            raise write_error(self.path, error) from error


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            raise ShardInUseError(
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

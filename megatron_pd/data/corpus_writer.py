"""Writes Megatron's `.bin/.idx` in pieces of many documents, in memory that doesn't grow with them.

Each document is one sequence of the index (index.py). Megatron's own IndexedDatasetBuilder holds
some 100 bytes a document until the end.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from megatron_pd.data.index import HEADER, bin_path, idx_path, pack_header
from megatron_pd.errors import UserError
from megatron_pd.workers import stops_wait

__all__ = ["CorpusWriter"]

_PIECE = 1 << 20  # documents
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class CorpusWriter:
    """A corpus in the making, `<prefix>.unfinished.bin/.idx` until `publish`.

    A context manager: what was not published when it ends is removed, and a corpus that had the
    name before is as it was.

    Args:
        dtype: of the tokens in the file.
    Raises:
        UserError: another process is writing this corpus.
        OSError: of writing, here and in every method; `filename` is the file.
    """

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self.documents = self.tokens = 0
        self._published = False
        unfinished = f"{prefix}.unfinished"
        self._bin = _File(bin_path(unfinished))
        try:
            self._idx = _File(idx_path(unfinished))
            self._idx.write(bytes(HEADER.size))
        except BaseException:
            self._bin.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object = None, error: BaseException | None = None, trace: object = None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            error.add_note(
                "the corpus is complete"
                if self._published
                else "no corpus was written, an earlier one stays"
            )
        for file in (self._bin, self._idx):
            file.close() if self._published else file.remove()

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: of all of them, one after the other: 1-D, contiguous, in the corpus's dtype.
            lengths: of each of them, above 0: int32 [documents].
        """
        if not len(lengths):
            return
        assert tokens.dtype == self._dtype and lengths.dtype == np.int32
        assert lengths.sum(dtype=np.int64) == len(tokens)
        self._bin.write(tokens.data)
        self._idx.write(lengths.data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def publish(self) -> None:
        """Finish both files and give them their names, once they are on the disk."""
        position = 0
        for start in range(0, self.documents, _PIECE):
            count = min(_PIECE, self.documents - start)
            lengths = np.frombuffer(self._idx.read(HEADER.size + 4 * start, 4 * count), np.int32)
            sizes = lengths.astype(np.int64) * self._dtype.itemsize
            ends = position + np.cumsum(sizes)
            self._idx.write((ends - sizes).data)
            position = int(ends[-1])
        for start in range(0, self.documents + 1, _PIECE):
            stop = min(start + _PIECE, self.documents + 1)
            self._idx.write(np.arange(start, stop, dtype=np.int64).data)
        self._idx.write_at(0, pack_header(self._dtype, self.documents))
        for file in (self._bin, self._idx):
            file.sync()
        with stops_wait():
            # First the index that was here: of no moment is there one beside another's tokens.
            Path(idx_path(self._prefix)).unlink(missing_ok=True)
            self._bin.rename(bin_path(self._prefix))
            self._idx.rename(idx_path(self._prefix))
            self._published = True


class _File:
    """A new file that one process writes, unbuffered. Errors name it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._end = 0
        self._descriptor = _open_locked(path)
        with self._named():
            os.ftruncate(self._descriptor, 0)  # what a killed process left

    def write(self, data: bytes | memoryview) -> None:
        self.write_at(self._end, data)
        self._end += memoryview(data).nbytes

    def write_at(self, position: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        with self._named():
            while view:
                written = os.pwrite(self._descriptor, view, position)
                position += written
                view = view[written:]

    def read(self, position: int, count: int) -> bytes:
        with self._named():
            return os.pread(self._descriptor, count, position)

    def sync(self) -> None:
        with self._named():
            os.fsync(self._descriptor)

    def rename(self, path: str) -> None:
        os.replace(self._path, path)

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        Path(self._path).unlink(missing_ok=True)
        self.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{os.strerror(error.errno or 0)}; no corpus was written, an earlier one stays"
            raise OSError(error.errno, reason, self._path) from error


def _open_locked(path: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"{path}: another process is writing this corpus. Wait for it, or choose another "
                "prefix."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # a file system without locks
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last writer published or removed it before our lock

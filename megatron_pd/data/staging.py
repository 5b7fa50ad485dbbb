"""A corpus and its logit store, copied from object storage or a shared folder to a local disk.

What is there already, whole, is not copied again; a file that was cut off goes on where it was. The
source may be away for a while. Files are complete under their names: the index of the corpus comes
last, so that training finds either all or nothing.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from megatron_pd.data.corpus import MegatronCorpus, store_path_of
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore

__all__ = ["FolderSource", "S3Source", "Source", "source_of", "stage"]

_CHUNK = 16 << 20
_PAUSE = 1.0
_TRY_AGAIN = (408, 429)  # too slow, too often
_LAST = (".bin", ".pd/store.json", ".idx")


class Source(Protocol):
    """The files of a corpus prefix, by what follows the prefix: `.bin`, `.idx`, `.pd/…`."""

    def sizes(self) -> dict[str, int]:
        """File → bytes. Raises OSError while the source is away."""
        ...

    def read(self, suffix: str, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`, at least one. Raises OSError, as `sizes`."""
        ...


class FolderSource:
    """On a file system, `prefix` as for --data-path."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def sizes(self) -> dict[str, int]:
        files = [f"{self.prefix}.bin", f"{self.prefix}.idx"]
        if os.path.isdir(f"{self.prefix}.pd"):
            files += [entry.path for entry in os.scandir(f"{self.prefix}.pd")]
        return {
            path.removeprefix(self.prefix): os.path.getsize(path)
            for path in files
            if os.path.isfile(path)
        }

    def read(self, suffix: str, offset: int, length: int) -> bytes:
        with open(self.prefix + suffix, "rb") as file:
            file.seek(offset)
            return file.read(length)


class S3Source:
    """`s3://bucket/prefix`, by boto3: credentials and AWS_ENDPOINT_URL are those of AWS's tools.

    Raises:
        UserError: boto3 is not installed; from the methods, the server refuses a request.
    """

    def __init__(self, url: str) -> None:
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError as error:
            raise UserError(f"{url}: s3:// needs boto3: pip install 'megatron-pd[s3]'.") from error
        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        once = Config(retries={"max_attempts": 1}, connect_timeout=10, read_timeout=60)
        self._client = boto3.client("s3", config=once)
        self._away, self._refused = BotoCoreError, ClientError

    def sizes(self) -> dict[str, int]:
        def listed() -> dict[str, int]:
            pages = self._client.get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
            return {
                suffix: entry["Size"]
                for page in found
                for entry in page.get("Contents", ())
                if (suffix := entry["Key"].removeprefix(self._prefix)) in (".bin", ".idx")
                or suffix.startswith(".pd/")
            }

        return self._failing_as_os_error(listed)

    def read(self, suffix: str, offset: int, length: int) -> bytes:
        def got() -> bytes:
            part = f"bytes={offset}-{offset + length - 1}"
            key = self._prefix + suffix
            answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=part)
            return bytes(answer["Body"].read())

        return self._failing_as_os_error(got)

    def _failing_as_os_error[Result](self, request: Callable[[], Result]) -> Result:
        try:
            return request()
        except self._refused as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if 400 <= status < 500 and status not in _TRY_AGAIN:
                raise UserError(f"s3://{self._bucket}/{self._prefix}: {error}") from error
            raise OSError(str(error)) from error
        except self._away as error:
            raise OSError(str(error)) from error


def source_of(address: str) -> Source:
    """By the address's kind."""
    return S3Source(address) if address.startswith("s3://") else FolderSource(address)


def stage(
    source: Source,
    target: str,
    *,
    workers: int,
    patience: float,
    report: Callable[[int], Any] = lambda count: None,
) -> int:
    """Copy what `target`, a corpus prefix, lacks, and compare the store with the corpus.

    Args:
        workers: files that are copied at once.
        patience: seconds for which the source may be away.
        report: is told of every piece of bytes.
    Returns:
        the bytes that were copied.
    Raises:
        UserError: the source has no such corpus, or was away for too long; the disk is too small;
            what was copied doesn't belong together.
    """
    sizes = _patiently(source.sizes, patience)
    if ".bin" not in sizes or ".idx" not in sizes:
        raise UserError(
            "The source has no .bin and .idx under this prefix: look for a typing error."
        )
    sizes = {name: size for name, size in sizes.items() if not name.endswith(".partial")}
    missing = {name: size for name, size in sizes.items() if not _is_there(target + name, size)}
    folder = Path(target).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    begun = sum(_size(_unfinished(target + name)) for name in missing)
    needed, free = sum(missing.values()) - begun, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has {free:,} bytes free and {needed:,} are to come.")
    for name in missing:
        os.makedirs(os.path.dirname(target + name) or ".", exist_ok=True)

    def copy(name: str) -> int:
        return _copy(source, name, missing[name], target + name, patience, report)

    with ThreadPoolExecutor(workers) as pool:
        copied = sum(pool.map(copy, sorted(missing.keys() - set(_LAST))))
    copied += sum(copy(name) for name in _LAST if name in missing)
    if any(name.startswith(".pd/") for name in sizes):
        LogitStore(store_path_of(target)).check_corpus(MegatronCorpus(target))
    return copied


def _copy(
    source: Source,
    name: str,
    size: int,
    path: str,
    patience: float,
    report: Callable[[int], Any],
) -> int:
    with open(_unfinished(path), "ab") as file:
        begin = end = file.tell()
        while end < size:
            length, offset = min(_CHUNK, size - end), end
            piece = _patiently(lambda: source.read(name, offset, length), patience)  # noqa: B023
            file.write(piece)
            end += len(piece)
            report(len(piece))
        file.flush()
        os.fsync(file.fileno())
    if end > size:
        raise UserError(f"{_unfinished(path)} is of another file: delete it and stage again.")
    os.replace(_unfinished(path), path)
    return end - begin


def _patiently[Result](request: Callable[[], Result], patience: float) -> Result:
    deadline = time.monotonic() + patience
    while True:
        try:
            return request()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"The source was away for {patience:g} s ({error}): the same command goes on "
                    "where this one stopped."
                ) from error
            time.sleep(_PAUSE)


def _unfinished(path: str) -> str:
    return f"{path}.staging"


def _is_there(path: str, size: int) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == size


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0

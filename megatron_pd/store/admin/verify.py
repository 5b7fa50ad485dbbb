"""Checks every byte of a store: `megatron-pd verify`.

The work is cut into runs of blocks, so that several processes share even a single large shard. What
is done goes into a journal, and an interrupted check goes on where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_pd.errors import naming
from megatron_pd.store.admin.journal import Journal, file_identity
from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.codecs.in_store import by_number
from megatron_pd.store.format import (
    MANIFEST_NAME,
    Manifest,
    lengths_digest,
    parse_shard_name,
)
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.shard import Shard
from megatron_pd.store.types import Corpus, StoreError

__all__ = ["verify_corpus", "verify_store"]

_RUN_BLOCKS = 1024  # half a million rows, some 20 MB


@dataclass(frozen=True)
class _Run:
    """Blocks [first, last) of a shard; with last = 0 the shard's index, with -1 its layout."""

    shard: int
    first: int
    last: int


_INDEX, _LAYOUT = 0, -1


def verify_store(
    path: Path,
    workers: int = 1,
    *,
    journal: Journal | None = None,
    progress: Progress = lambda size: None,
) -> list[str]:
    """One sentence for everything that is wrong with the store at `path`; none for a sound one.

    Args:
        journal: keeps what is done until all is; its units are bytes of the shards.
        progress: is told bytes of the shards.
    """
    try:
        with naming(path / MANIFEST_NAME):
            data = (path / MANIFEST_NAME).read_bytes()
        manifest = Manifest.from_bytes(data, path / MANIFEST_NAME)
        shards, problems = _open_shards(path, manifest)
    except (FileNotFoundError, NotADirectoryError):
        return [f"{path}: no logit store here ({MANIFEST_NAME} is missing)."]
    except StoreError as error:
        return [str(error)]
    identities = [file_identity(shard.path) for shard in shards]
    runs = [_Run(index, 0, _INDEX) for index in range(len(shards))]
    for index, shard in enumerate(shards):
        edges = [*range(0, shard.footer.blocks, _RUN_BLOCKS), shard.footer.blocks]
        runs += [_Run(index, first, last) for first, last in itertools.pairwise(edges)]

    def check(run: _Run, report: Progress) -> list[str]:
        return list(dict.fromkeys(_problems_of(shards[run.shard], run, report)))

    def key(run: _Run) -> str:
        return f"{identities[run.shard]} {run.first} {run.last}"

    def check_all(runs: list[_Run]) -> None:
        left = []
        for run in runs:
            size = _size(shards[run.shard], run)
            known = None if journal is None else journal.take(key(run), size)
            if known is None:
                left.append(run)
            else:
                problems.extend(known)
                progress(size)
        for run, found in run_jobs(check, left, workers, progress):
            if journal is not None:
                journal.add(key(run), found)
            problems.extend(found)

    check_all(runs)
    # A shard with a bad block has no sound layout either: that would only be said twice.
    bad = {shard.path.name for shard in shards if any(str(shard.path) in p for p in problems)}
    sound = [index for index, shard in enumerate(shards) if shard.path.name not in bad]
    check_all([_Run(index, 0, _LAYOUT) for index in sound])
    if not problems:
        problems += _problems_of_whole(path, manifest)
    if journal is not None:
        journal.close()
    return list(dict.fromkeys(problems))


def verify_corpus(
    path: Path, corpus: Corpus, workers: int = 1, progress: Progress = lambda documents: None
) -> list[str]:
    """One sentence for each shard whose documents are not, token by token, those of `corpus`.

    Args:
        progress: is told documents.
    """
    store = LogitStore(path)
    lengths = np.asarray(corpus.document_lengths, np.int64)
    if len(lengths) != store.num_documents:
        try:
            store.check_corpus(corpus)
        except StoreError as error:
            return [str(error)]
    shards, problems = _open_shards(path, store.manifest)

    def check(index: int, report: Progress) -> str | None:
        try:
            shards[index].check_corpus(corpus, lengths, full=True)
        except StoreError as error:
            return str(error)
        finally:
            report(len(shards[index].documents))
        return None

    jobs = range(len(shards))
    return problems + [
        problem for _, problem in run_jobs(check, jobs, workers, progress) if problem is not None
    ]


def _open_shards(path: Path, manifest: Manifest) -> tuple[list[Shard], list[str]]:
    """The shards that can be opened, and what is wrong with the others."""
    codecs = by_number(manifest.codecs, path / MANIFEST_NAME)
    shards, problems = [], []
    for file in sorted(path.iterdir()):
        documents = parse_shard_name(file.name)
        if documents is not None:
            try:
                with naming(file):
                    shard = Shard(file, documents, manifest.store_id, codecs)
                    _ = shard.native
                shards.append(shard)
            except StoreError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{error.filename}: cannot be read: {error.strerror}.")
    return shards, problems


def _problems_of(shard: Shard, run: _Run, report: Progress) -> Iterator[str]:
    checks: list[Callable[[], None]]
    if run.last == _INDEX:
        checks = [shard.check_index]
    elif run.last == _LAYOUT:
        checks = [shard.check_frames]
    else:
        checks = [partial(_check_block, shard, block) for block in range(run.first, run.last)]
    reported = 0
    for done, check in enumerate(checks, 1):
        try:
            check()
        except StoreError as error:
            yield str(error)
        size = _size(shard, replace(run, last=run.first + done)) if run.last > 0 else 0
        report(size - reported)
        reported = size


def _check_block(shard: Shard, block: int) -> None:
    shard.check_block(block)
    shard.check_masses(block)


def _size(shard: Shard, run: _Run) -> int:
    """Bytes that a run stands for in the progress; all runs of a shard together: its size."""
    if run.last <= 0:
        return 0
    size, blocks = shard.footer.file_bytes, shard.footer.blocks
    return size * run.last // blocks - size * run.first // blocks


def _problems_of_whole(path: Path, manifest: Manifest) -> list[str]:
    """The shards make up the corpus of the manifest: no document missing, lengths as promised."""
    try:
        lengths = LogitStore(path).document_lengths
    except StoreError as error:
        return [str(error)]
    if lengths_digest(lengths) == manifest.lengths_digest:
        return []
    return [
        f"{path}: the shards' document lengths ({int(np.sum(lengths))} rows in all) are not "
        f"those of {MANIFEST_NAME} ({manifest.rows} rows). Dump the store again."
    ]

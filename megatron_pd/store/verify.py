"""Checks every byte of a store: `megatron-pd verify`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from megatron_pd.store.format import MANIFEST_NAME, Manifest, parse_shard_name
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.rows import StoreError
from megatron_pd.store.shard import Shard

__all__ = ["verify_shard", "verify_store"]


def verify_store(
    path: Path, workers: int = 1, progress: Callable[[Path], None] = lambda shard: None
) -> list[str]:
    """One sentence for everything that is wrong with the store at `path`; none for a sound one.

    `progress` is called with each shard that has been read in full.
    """
    try:
        manifest = Manifest.from_bytes((path / MANIFEST_NAME).read_bytes(), path / MANIFEST_NAME)
    except FileNotFoundError:
        return [f"{path}: no logit store here ({MANIFEST_NAME} is missing)."]
    except StoreError as error:
        return [str(error)]
    shards = sorted(file for file in path.iterdir() if parse_shard_name(file.name))
    problems = []
    with ProcessPoolExecutor(max_workers=workers) as pool:
        mapped = pool.map if workers > 1 else map
        found = mapped(verify_shard, shards, [manifest.store_id] * len(shards))
        for shard, sentences in zip(shards, found, strict=True):
            problems += sentences
            progress(shard)
    if not problems:
        try:
            _check_whole(path, manifest)
        except StoreError as error:
            problems.append(str(error))
    return problems


def verify_shard(path: Path, store_id: int) -> list[str]:
    """Reads and decodes every block of a shard; one sentence for each fault."""
    documents = parse_shard_name(path.name)
    assert documents is not None
    problems = []
    try:
        shard = Shard(path, documents, store_id)
        shard.check_index()
        for block in range(shard.footer.blocks):
            try:
                shard.check_block(block)
            except StoreError as error:
                problems.append(str(error))
        if not problems:
            shard.check_frames()
    except StoreError as error:
        problems.append(str(error))
    return problems


def _check_whole(path: Path, manifest: Manifest) -> None:
    """The shards make up the corpus of the manifest: no document missing, lengths as promised."""
    store = LogitStore(path)
    lengths = store.document_lengths
    digest = Manifest.of(1, lengths, 0, {}).lengths_digest
    if digest != manifest.lengths_digest:
        raise StoreError(
            f"{path}: the shards' document lengths ({int(np.sum(lengths))} rows in all) are not "
            f"those of {MANIFEST_NAME} ({manifest.rows} rows). Dump the store again."
        )

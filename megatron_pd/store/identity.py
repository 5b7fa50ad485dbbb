"""Whether a writer comes with what a store was begun with; if not, what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.store.format import Manifest, ShardHeader, corpus_digests
from megatron_pd.store.types import Corpus, StoreError

__all__ = ["check_digests", "check_header", "check_manifest", "check_statistics"]


def check_manifest(path: Path, begun: Manifest, now: Manifest) -> None:
    """StoreError with all that differs, unless a writer of `now` may go on with what is at `path`.

    Where both teachers have the same fingerprint, their names don't count.
    """
    names = ("documents", "rows", "lengths_digest")
    there, here = ({name: getattr(m, name) for name in names} for m in (begun, now))
    differ = []
    if there != here:
        differ.append(
            f"begun with a corpus of {begun.documents} documents and {begun.rows} tokens, now one "
            f"of {now.documents} and {now.rows}, of other lengths"
        )
    there, here = dict(begun.metadata), dict(now.metadata)
    if there.get("fingerprint") is not None and there["fingerprint"] == here.get("fingerprint"):
        there.pop("teacher", None)
        here.pop("teacher", None)
    for manifest, settings in ((begun, there), (now, here)):
        settings |= {"vocab_size": manifest.vocab_size, "draws": manifest.draws}
    differ += _differences(there, here)
    if begun.codecs != now.codecs and not _is_older(begun, now):
        differ += _differences({"codecs": _named(begun)}, {"codecs": _named(now)})
    _raise(path, "the store", differ)


def check_header(path: Path, begun: ShardHeader, now: ShardHeader) -> None:
    """The same for an unfinished shard's header."""
    _raise(
        path,
        "this unfinished shard",
        _differences(dataclasses.asdict(begun), dataclasses.asdict(now)),
    )


def check_statistics(path: Path, begun: tuple[str, ...], now: tuple[str, ...]) -> None:
    """The same for the statistics of a shard's rows."""
    _raise(path, "this shard", _differences({"statistics": begun}, {"statistics": now}))


def check_digests(
    path: Path, documents: np.ndarray, digests: np.ndarray, there: Corpus | np.ndarray
) -> None:
    """StoreError unless documents (int64 numbers in the corpus) have the digests (uint64 of each)
    that a corpus gives, or that are given as uint64 too."""
    if not isinstance(there, np.ndarray):
        there = corpus_digests(there, documents)
    differ = (there != digests) & (there != 0)  # 0.1.0 had other digests of no tokens
    if differ.any():
        raise StoreError(
            f"{path}: was begun with another corpus: document {documents[differ.argmax()]} has "
            "other tokens now. Go on with the corpus that the teacher read, or write another store."
        )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def shown(settings: Mapping[str, Any], name: str) -> str:
        return f"{name}={settings[name]!r}" if name in settings else f"no {name}"

    return [
        f"begun with {shown(begun, name)}, now {shown(now, name)}"
        for name in sorted(begun.keys() | now.keys())
        if name not in begun or name not in now or begun[name] != now[name]
    ]


def _raise(path: Path, what: str, differ: list[str]) -> None:
    if differ:
        raise StoreError(
            f"{path}: {what} was {'; was '.join(differ)}. Go on with what it was begun with, on "
            "every rank, or write another store."
        )


def _is_older(begun: Manifest, now: Manifest) -> bool:
    """Whether a store was begun before there was the field `codecs`, and can be gone on with."""
    assert now.codecs is not None
    return begun.codecs is None and not any("import" in entry for entry in now.codecs)


def _named(manifest: Manifest) -> str | None:
    if manifest.codecs is None:
        return None
    return ", ".join(
        f"{entry['name']} version {entry['version']}"
        + (f" ({entry['import']})" if "import" in entry else "")
        for entry in manifest.codecs
    )

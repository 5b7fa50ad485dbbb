"""The codecs of one store: what its manifest calls them, and the numbers in its blocks' headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_pd.errors import UserError
from megatron_pd.store.codecs import CODECS, Codec, CompactCodec, ExactCodec, codec_named
from megatron_pd.store.types import StoreError

__all__ = ["by_number", "manifest_entries"]

_FIXED: dict[int, type[Codec]] = {0: ExactCodec, 1: CompactCodec}  # by the format
_STATISTICS_DTYPES = ("<f4", "<f2")


def manifest_entries(codecs: Iterable[type[Codec]]) -> list[dict[str, Any]]:
    """The manifest's field `codecs`: name, version and number of each, and of codecs from elsewhere
    what to import. A function of the set of codecs alone.

    Raises:
        StoreError: two of one name, or one that no reader could find again.
    """
    numbers = {codec: number for number, codec in _FIXED.items()}
    entries = []
    for codec in sorted(set(codecs), key=lambda codec: codec.name):
        entry = {
            "name": codec.name,
            "version": codec.version,
            "number": numbers.setdefault(codec, len(numbers)),
        }
        if (path := _import_path(codec)) is not None:
            entry["import"] = path
        entries.append(entry)
    names = [entry["name"] for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise StoreError(
                f"Two codecs are called {name!r}: one store can't have both. Give one of them "
                "another name and recode its store."
            )
    return entries


def by_number(
    entries: Iterable[Mapping[str, Any]] | None, manifest: Path
) -> dict[int, type[Codec]]:
    """The codec of each number in a block's header.

    Args:
        entries: the manifest's field; None where a store from before it was there has none.
        manifest: named by the errors.
    Raises:
        StoreError: a codec that isn't here, or another version of it.
    """
    codecs = dict(_FIXED)
    for entry in entries or ():
        codecs[entry["number"]] = _found(entry, manifest)
    return codecs


def _found(entry: Mapping[str, Any], manifest: Path) -> type[Codec]:
    name, version, path = entry["name"], entry["version"], entry.get("import")
    if path is None and name not in CODECS.names:
        raise StoreError(
            f"{manifest}: the store's rows are coded by {name!r}, and this release of megatron_pd "
            f"has {' and '.join(CODECS)}. Install the release that wrote the store."
        )
    try:
        codec = codec_named(path or name)
    except UserError as error:
        raise StoreError(
            f"{manifest}: the store's rows are coded by {name!r}, which isn't here. {error}"
        ) from error
    if (codec.name, codec.version) != (name, version):
        raise StoreError(
            f"{manifest}: the store's rows are coded by {name!r} of version {version}, and "
            f"{path or 'this release of megatron_pd'} is {codec.name!r} of version "
            f"{codec.version}. Install what wrote the store, or recode it there."
        )
    return codec


def _import_path(codec: type[Codec]) -> str | None:
    """What imports a codec that is not the package's."""
    name = getattr(codec, "name", None)
    if name in CODECS.names and CODECS.get(name) is codec:
        return None
    path = f"{codec.__module__}:{codec.__qualname__}"
    if not isinstance(name, str) or not name or name in CODECS.names:
        raise StoreError(
            f"{path} has the name {name!r}: give it one of its own, as `name = ...` in the class."
        )
    if not isinstance(getattr(codec, "version", None), int):
        raise StoreError(f"{path} has no version: give it one, as `version = 1` in the class.")
    if codec.statistics_dtype not in _STATISTICS_DTYPES:
        raise StoreError(
            f"{path} has statistics_dtype {codec.statistics_dtype!r}: choose one of "
            f"{', '.join(_STATISTICS_DTYPES)}."
        )
    try:
        found = codec_named(path)
    except UserError:
        found = None
    if found is not codec:
        raise StoreError(
            f"Readers could not find the codec {name!r} again: {path} can't be imported or is "
            "another class. Define it at the top of a module that is on PYTHONPATH."
        )
    return path

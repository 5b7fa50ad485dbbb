"""What the store's commands share: a progress bar, the options of a copy and its last line."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_pd.errors import if_stopped

if TYPE_CHECKING:
    from megatron_pd.store import LogitStore

__all__ = [
    "add_codec_arguments",
    "add_copy_arguments",
    "add_workers",
    "positive",
    "print_store",
    "progress_bar",
]


def positive(text: str) -> int:
    """An argument's whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return number


@contextlib.contextmanager
def progress_bar(
    total: int | None, unit: str = " rows", *, resumable: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with the units that were done; shown on a terminal only."""
    from tqdm import tqdm

    with (
        if_stopped("the same command goes on from here") if resumable else contextlib.nullcontext(),
        tqdm(total=total, unit=unit, unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):

        def advance(units: int) -> None:
            bar.update(units)

        yield advance


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    """How the blocks of a new store are coded."""
    from megatron_pd.store.codecs import CODECS

    parser.add_argument(
        "--codec",
        choices=CODECS,
        default="compact",
        help="or your own as package.module:attribute; default: compact",
    )
    parser.add_argument(
        "--value-bits", type=int, default=10, help="of the log-probabilities in `compact`"
    )


def add_copy_arguments(
    parser: argparse.ArgumentParser, shard_tokens: int | None, default: str
) -> None:
    """The options of every command that writes a store from another."""
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=shard_tokens,
        help="tokens of a shard of the new store, about and at most (a document is never cut); "
        f"default: {default}",
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def print_store(store: "LogitStore", as_json: bool) -> None:
    """One line about a store that was written."""
    from megatron_pd.store.admin.inspect import summary

    figures = summary(store)
    if as_json:
        print(json.dumps(figures))
        return
    print(
        f"{store.path}: {figures['documents']:,} documents, {figures['rows']:,} tokens, "
        f"{figures['entries']:,} entries in {figures['shards']:,} shards, {figures['bytes']:,} "
        f"bytes ({figures['bytes_per_token']} per token)"
    )

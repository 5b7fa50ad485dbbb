"""`megatron-pd merge`: several stores → one."""

import argparse

from megatron_pd.cli.common import add_copy_arguments, print_store, progress_bar

HELP = (
    "Join stores into one: stores that each hold some documents of the same corpus, or (with "
    "--concatenate) stores of corpora that were concatenated. Every row is copied as it is. "
    "Interrupted, the same command goes on where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="+", help="the stores' directories")
    parser.add_argument("--output", required=True, help="directory of the new store")
    parser.add_argument(
        "--concatenate",
        action="store_true",
        help="the new store belongs to the concatenation of the stores' corpora, in this order",
    )
    parser.add_argument(
        "--ignore-metadata",
        action="store_true",
        help="join although the stores' descriptions (teacher, top-p, ...) differ; the first "
        "one's is kept",
    )
    add_copy_arguments(parser, 1 << 26, "2^26")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_pd.store import LogitStore, StoreError
    from megatron_pd.store.admin.merge import concatenated, copy, joined, joined_metadata

    stores = [LogitStore(path, allow_partial=not args.concatenate) for path in args.stores]
    first = stores[0].metadata
    for store in stores[1:]:
        names = {
            name for name in first | store.metadata if first.get(name) != store.metadata.get(name)
        }
        if names and not args.ignore_metadata:
            name = min(names)
            raise StoreError(
                f"{store.path} has {name} {store.metadata.get(name)!r}, {stores[0].path} has "
                f"{first.get(name)!r}. Join stores of one teacher; where only a path or a name "
                "changed, give --ignore-metadata."
            )
    parts = concatenated(stores) if args.concatenate else joined(stores)
    with progress_bar(sum(int(store.document_lengths.sum()) for store in stores)) as progress:
        merged = copy(
            parts,
            Path(args.output),
            metadata=joined_metadata(stores),
            shard_rows=args.shard_tokens,
            workers=args.workers,
            progress=progress,
        )
    print_store(merged, args.json)
    return 0

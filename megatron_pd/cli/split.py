"""`megatron-pd split`: one store → smaller shards, or several stores."""

import argparse

from megatron_pd.cli.common import add_copy_arguments, positive, print_store, progress_bar

HELP = (
    "Cut a store into smaller shards or, with --at or --parts, into several stores whose documents "
    "are numbered from 0 (for a corpus that is cut at the same documents; `merge --concatenate` "
    "undoes it). Every row is copied as it is. Interrupted, the same command goes on where it "
    "stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument(
        "--output",
        required=True,
        help="directory of the new store; of several stores new-0.pd, new-1.pd, ... for new.pd",
    )
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument(
        "--parts", type=positive, help="into so many stores of about equally many tokens"
    )
    cut.add_argument(
        "--at", type=int, nargs="+", metavar="DOCUMENT", help="first document of each further store"
    )
    add_copy_arguments(parser, None, "2^26, with --parts or --at")


def run(args: argparse.Namespace) -> int:
    import itertools
    from pathlib import Path

    from megatron_pd.store import LogitStore, StoreError
    from megatron_pd.store.admin.merge import SHARD_ROWS, DocumentRange, copy, even_ranges, whole

    if not (args.parts or args.at or args.shard_tokens):
        raise StoreError("Say how to split: --shard-tokens, --parts or --at.")
    store = LogitStore(args.store)
    output = Path(args.output)
    outputs = {output: whole(store)}
    if args.parts or args.at:
        if args.parts:
            ranges = even_ranges(store.document_lengths, args.parts)
        else:
            edges = [0, *args.at, store.num_documents]
            if sorted(set(edges)) != edges:
                raise StoreError(
                    f"--at {args.at}: give rising document numbers between 1 and "
                    f"{store.num_documents - 1}; {store.path} has {store.num_documents} documents."
                )
            ranges = [range(a, b) for a, b in itertools.pairwise(edges)]
        outputs = {
            output.with_name(f"{output.stem}-{number}{output.suffix}"): [
                DocumentRange(store, documents)
            ]
            for number, documents in enumerate(ranges)
        }
    written = []
    with progress_bar(store.num_rows) as progress:
        for path, parts in outputs.items():
            written.append(
                copy(
                    parts,
                    path,
                    metadata=store.metadata,
                    shard_rows=args.shard_tokens or SHARD_ROWS,
                    workers=args.workers,
                    progress=progress,
                )
            )
    for part in written:
        print_store(part, args.json)
    return 0

"""`megatron-pd recode`: a store → the same rows in another codec, or fewer entries of each."""

import argparse

from megatron_pd.cli.common import (
    add_codec_arguments,
    add_copy_arguments,
    print_store,
    progress_bar,
)

HELP = (
    "Write a store again in another codec, or cut its rows to a smaller top-p or top-k. "
    "Interrupted, the same command goes on where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument("--output", required=True, help="directory of the new store")
    add_codec_arguments(parser)
    parser.add_argument(
        "--top-p", type=float, help="keep the smallest set of entries with this mass, in (0, 1]"
    )
    parser.add_argument("--top-k", type=int, help="then keep the top k entries")
    add_copy_arguments(parser, None, "the shards of the store")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.recode import recode

    store = LogitStore(args.store)
    with progress_bar(store.num_rows) as progress:
        recoded = recode(
            store,
            Path(args.output),
            codec=args.codec,
            value_bits=args.value_bits,
            top_p=args.top_p,
            top_k=args.top_k,
            shard_rows=args.shard_tokens,
            workers=args.workers,
            progress=progress,
        )
    print_store(recoded, args.json)
    return 0

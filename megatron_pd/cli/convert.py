"""`megatron-pd convert`: stores from Megatron's cached logits, and from and to Parquet."""

import argparse
import sys
from pathlib import Path

from megatron_pd.cli.common import add_codec_arguments, add_workers, print_store, progress_bar

HELP = "Make a store from Megatron's cached logits or from Parquet files, or Parquet from a store."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(required=True, metavar="direction", dest="direction")
    described = {
        "from-megatron": "a store from the tar shards that Megatron's --logits-save-dir wrote "
        "(takes the teacher run's Megatron flags)",
        "to-parquet": "Parquet files from a store: a row per token with document, offset, ids, "
        "logprobs. Interrupted, the same command goes on with the next file.",
        "from-parquet": "a store from Parquet files. Interrupted, the same command goes on.",
    }
    directions = {
        name: subparsers.add_parser(name, help=text, description=text)
        for name, text in described.items()
    }
    parser = directions["to-parquet"]
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument("--output", required=True, type=Path, help="folder of the new files")
    add_workers(parser)
    parser = directions["from-parquet"]
    parser.add_argument("files", nargs="+", type=Path, help="files, or folders of .parquet files")
    parser.add_argument("--output", required=True, type=Path, help="directory of the new store")
    parser.add_argument(
        "--corpus",
        help="prefix of the .bin/.idx corpus, which is compared with the digests in the files, and "
        "to which the store is bound",
    )
    parser.add_argument("--vocab-size", type=int, help="of files that to-parquet did not write")
    add_codec_arguments(parser)
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    return {"to-parquet": _to_parquet, "from-parquet": _from_parquet}[args.direction](args)


def _to_parquet(args: argparse.Namespace) -> int:
    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.parquet import to_parquet

    store = LogitStore(args.store)
    with progress_bar(store.num_rows) as progress:
        files = to_parquet(store, args.output, workers=args.workers, progress=progress)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.output}: {len(files):,} files, {store.num_rows:,} rows, {size:,} bytes")
    return 0


def _from_parquet(args: argparse.Namespace) -> int:
    from megatron_pd.store.admin.parquet import from_parquet

    corpus = None
    if args.corpus is not None:
        from megatron_pd.data.corpus import MegatronCorpus

        corpus = MegatronCorpus(args.corpus)
    with progress_bar(None) as progress:
        store = from_parquet(
            args.files,
            args.output,
            vocab_size=args.vocab_size,
            corpus=corpus,
            codec=args.codec,
            value_bits=args.value_bits,
            workers=args.workers,
            progress=progress,
            note=lambda sentence: print(f"note: {sentence}", file=sys.stderr),
        )
    print_store(store, args.json)
    return 0


def main() -> int:
    """`convert from-megatron`, which leaves the command line to Megatron's parser."""
    from megatron_pd.teacher.cached_logits.convert import main

    return main()

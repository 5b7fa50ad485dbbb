"""`megatron-pd verify`: is every byte of a logit store intact, and is it this corpus's?"""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_pd.cli.common import add_workers, progress_bar

HELP = (
    "Read a logit store in full and name every damaged block; optionally check its corpus. "
    "Interrupted, the same command goes on where it stopped. Exit status 1: something is wrong."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument(
        "--corpus", help="prefix of the .bin/.idx corpus whose tokens to compare, all of them"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        help="file that keeps what an interrupted check has done, for shards whose size, time of "
        "change and footer stay the same; removed at the end; delete it to start over; default: "
        "STORE.verify-journal beside the store",
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_pd.store.admin.verify import verify_corpus, verify_store

    store = Path(args.store)
    size = sum(file.stat().st_size for file in store.glob("*.shard"))
    with progress_bar(size, "B") as progress:
        problems = verify_store(store, args.workers, journal=_journal(args), progress=progress)
    if args.corpus and not problems:
        from megatron_pd.megatron import cpu

        cpu.install()
        from megatron_pd.data.corpus import MegatronCorpus

        corpus = MegatronCorpus(args.corpus)
        with progress_bar(len(corpus), " documents") as progress:
            problems = verify_corpus(store, corpus, args.workers, progress)
    if args.json:
        print(json.dumps({"store": args.store, "intact": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{args.store}: intact.")
    return 1 if problems else 0


def _journal(args: argparse.Namespace) -> Path | None:
    if args.journal is not None:
        return args.journal
    path = Path(os.path.normpath(args.store) + ".verify-journal")
    if os.access(path.parent, os.W_OK):
        return path
    print(
        f"note: {path.parent} is not writable, so an interrupted check would start over; give "
        "--journal FILE to keep what is done.",
        file=sys.stderr,
    )
    return None

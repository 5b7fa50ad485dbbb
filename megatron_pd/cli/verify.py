"""`megatron-pd verify`: is every byte of a logit store intact, and is it this corpus's?"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_pd.cli.common import add_workers, progress_bar
from megatron_pd.errors import UserError

if TYPE_CHECKING:
    from megatron_pd.store.admin.journal import Journal

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
        help="file that keeps what an interrupted check has done, for shards whose size, inode and "
        "times of change stay the same; removed at the end; default: STORE.verify-journal beside "
        "the store",
    )
    parser.add_argument(
        "--anew",
        action="store_true",
        help="read everything, also what an interrupted check has read already",
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_pd.store.admin.verify import verify_store

    store = Path(args.store)
    size = sum(file.stat().st_size for file in store.glob("*.shard"))
    journal = _journal(args)
    with progress_bar(size, "B", resumable=journal is not None) as progress:
        problems = verify_store(store, args.workers, journal=journal, progress=progress)
    if args.corpus is not None:
        if problems:
            print("note: the corpus was not compared with a damaged store.", file=sys.stderr)
        else:
            problems = _compare(store, args)
    _print_verdict(args, problems, journal, size)
    return 1 if problems else 0


def _compare(store: Path, args: argparse.Namespace) -> list[str]:
    from megatron_pd.data.corpus import MegatronCorpus
    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.verify import verify_corpus

    if unbound := LogitStore(store).unbound_documents():
        print(
            f"note: {sum(map(len, unbound)):,} documents of {store} (from {unbound[0].start} to "
            f"{unbound[-1].stop - 1}) are bound to no corpus: there are no digests of their "
            "tokens, so their lengths alone are compared.",
            file=sys.stderr,
        )
    corpus = MegatronCorpus(args.corpus)
    with progress_bar(len(corpus), " documents", resumable=False) as progress:
        return verify_corpus(store, corpus, args.workers, progress)


def _print_verdict(
    args: argparse.Namespace, problems: list[str], journal: "Journal | None", size: int
) -> None:
    from_journal = None
    if journal is not None and journal.taken is not None:
        first, last = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for t in journal.taken)
        from_journal = {"bytes": journal.taken_units, "first": first, "last": last}
    if args.json:
        result = {"store": args.store, "intact": not problems, "problems": problems}
        print(json.dumps({**result, "bytes": size, "from_journal": from_journal}))
        return
    print("\n".join(problems) or f"{args.store}: intact.")
    if from_journal is not None:
        print(
            f"{args.store}: {from_journal['bytes']:,} of its {size:,} bytes were read by an "
            f"interrupted check between {from_journal['first']} and "
            f"{from_journal['last']}, and the files' sizes and times have "
            "not changed since; --anew reads them again."
        )


def _journal(args: argparse.Namespace) -> "Journal | None":
    from megatron_pd.store.admin.journal import Journal

    default = Path(os.path.normpath(args.store) + ".verify-journal")
    if not os.path.isdir(args.store):
        return None  # there is nothing to check
    try:
        return Journal(args.journal or default, anew=args.anew)
    except OSError as error:
        if args.journal is not None:
            raise UserError(
                f"--journal {args.journal} cannot be written: {error.strerror}. Give another file, "
                "or leave it out."
            ) from error
        print(
            f"note: {default} cannot be written ({error.strerror}), so an interrupted check would "
            "start over; give --journal FILE to keep what is done.",
            file=sys.stderr,
        )
    return None

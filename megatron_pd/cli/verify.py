"""`megatron-pd verify`: is every byte of a logit store intact, and is it this corpus's?"""

import argparse
import json
import sys

HELP = "Read a logit store in full and name every damaged block; optionally check its corpus."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument(
        "--corpus", help="prefix of the .bin/.idx corpus whose tokens to compare, all of them"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, a shard each")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from tqdm import tqdm

    from megatron_pd.store import LogitStore, StoreError
    from megatron_pd.store.verify import verify_store

    with tqdm(unit=" shards", disable=not sys.stderr.isatty()) as bar:
        problems = verify_store(Path(args.store), args.workers, lambda shard: bar.update() and None)
    if args.corpus and not problems:
        from megatron_pd.data.corpus import MegatronCorpus

        try:
            LogitStore(args.store).check_corpus(MegatronCorpus(args.corpus), full=True)
        except StoreError as error:
            problems.append(str(error))
    if args.json:
        print(json.dumps({"store": args.store, "intact": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{args.store}: intact.")
    return 1 if problems else 0

"""`megatron-pd stats`: bytes and entries per token, kept mass, the teacher's loss and entropy."""

import argparse
import json
import sys

HELP = "Bytes and entries per token, kept mass, teacher loss and entropy of a logit store."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument(
        "--max-rows",
        type=int,
        help="average over about this many rows, spread evenly; default: all rows",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_pd.store import LogitStore
    from megatron_pd.store.stats import store_stats

    store = LogitStore(args.store)
    with tqdm(unit=" rows", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        figures = store_stats(store, args.max_rows, lambda rows: bar.update(rows) and None)
    if args.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        text = "not stored" if value is None else value
        text = f"{value:,.4f}" if isinstance(value, float) else text
        text = f"{value:,}" if isinstance(value, int) else text
        print(f"{name.replace('_', ' '):22} {text}")
    return 0

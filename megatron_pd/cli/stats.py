"""`megatron-pd stats`: bytes and entries per token, kept mass, the teacher's loss and entropy."""

import argparse
import json

from megatron_pd.cli.common import add_workers, positive, progress_bar

HELP = "Bytes and entries per token, kept mass, teacher loss and entropy of a logit store."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument(
        "--max-rows",
        type=positive,
        help="average over about this many rows, spread evenly; default: all rows",
    )
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.scan import sampled_documents
    from megatron_pd.store.admin.stats import store_stats

    store = LogitStore(args.store, allow_partial=True)
    lengths = store.document_lengths
    rows = int(lengths[sampled_documents(store, args.max_rows)].sum())
    with progress_bar(rows, resumable=False) as progress:
        figures = store_stats(store, args.max_rows, args.workers, progress)
    if args.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        text = "not stored" if value is None else value
        text = f"{value:,.4f}" if isinstance(value, float) else text
        text = f"{value:,}" if isinstance(value, int) else text
        print(f"{name.replace('_', ' '):22} {text}")
    return 0

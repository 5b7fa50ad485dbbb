"""`megatron-pd collect`: the rows of an online capture → a store per corpus."""

import argparse

from megatron_pd.cli.common import add_workers, print_store, progress_bar

HELP = (
    "Make the stores of a training run with --pd-capture: one per corpus, in which a token has the "
    "row of the last iteration that read it. The run does it itself at its end. Interrupted, the "
    "same command goes on where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="the run's --pd-capture")
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object per store")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_pd.store.admin.parallel import run_jobs
    from megatron_pd.teacher.journal.collect import captured_stores, collections_of, journal_in
    from megatron_pd.teacher.journal.segments import Journal

    folder = Path(args.directory)
    journal = Journal(journal_in(folder))
    collections = collections_of(journal, captured_stores(folder, journal.corpora))
    total = sum(int(each.corpus.document_lengths.sum()) for each in collections)
    with progress_bar(total) as progress:
        for each in collections:
            for _ in run_jobs(each.write, each.shards, args.workers, progress):
                pass
    for each in collections:
        store = each.finished()
        assert store is not None
        print_store(store, args.json)
    return 0

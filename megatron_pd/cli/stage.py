"""`megatron-pd stage`: a corpus and its store from object storage to a local disk."""

import argparse

from megatron_pd.cli.common import positive, progress_bar

HELP = "Copy a corpus and its logit store from object storage or a shared folder to a local disk."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="corpus prefix: s3://bucket/path/corpus, or of a folder")
    parser.add_argument("target", help="corpus prefix on the local disk, as for --data-path")
    parser.add_argument(
        "--workers", type=positive, default=8, help="files that are copied at once; default: 8"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        help="seconds for which the source may be away; default: 600",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_pd.data.staging import source_of, stage

    with progress_bar(None, " B") as progress:
        copied = stage(
            source_of(args.source),
            args.target,
            workers=args.workers,
            patience=args.patience,
            report=progress,
        )
    print(f"{args.target}: complete, {copied:,} bytes were copied")
    return 0

"""`megatron-pd preprocess`: text → Megatron `.bin/.idx`."""

import argparse
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_pd.cli.common import positive

if TYPE_CHECKING:
    from megatron_pd.data.preprocess import CorpusSummary

HELP = "Tokenize JSON lines, Parquet or plain text into a Megatron .bin/.idx corpus."


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which documents to read."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="JSON lines (a document per line), Parquet (per row) and plain text files (per file); "
        "lines and text may be compressed with gzip or zstd",
    )
    parser.add_argument(
        "--input-format",
        choices=("jsonl", "parquet", "text"),
        help="of all files; default: by a file's suffix, or by its content",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        help="where a JSON line has its text, or the Parquet column; default: %(default)s",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--tokenizer-type",
        default="SentencePieceTokenizer",
        help="one of Megatron's, e.g. SentencePieceTokenizer or HuggingFaceTokenizer",
    )
    parser.add_argument("--tokenizer-model", required=True, help=".model file, folder or HF name")
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="tokenizing processes; default: the cores that this process may use, here %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_pd.megatron import cpu

    cpu.install()
    from megatron_pd.data.preprocess import preprocess
    from megatron_pd.data.tokenizer import tokenizer_config

    summary = preprocess(
        args.input,
        args.output_prefix,
        tokenizer_config(args.tokenizer_type, args.tokenizer_model),
        json_key=args.json_key,
        input_format=args.input_format,
        workers=args.workers,
    )
    print(
        f"{args.output_prefix}.bin/.idx: {summary.documents:,} documents, {summary.tokens:,} tokens"
        f" ({summary.empty_documents:,} empty documents left out)"
    )
    for note in _notes(summary):
        print(f"note: {note}", file=sys.stderr)
    return 0


def _notes(summary: "CorpusSummary") -> Iterator[str]:
    if summary.replaced_documents:
        yield (
            f"{summary.replaced_documents:,} documents had bytes that are not UTF-8, or lone "
            f"surrogates; each became U+FFFD. The first: {summary.first_replaced}."
        )
    if summary.inner_ends:
        yield (
            f"{summary.inner_ends:,} end-of-document tokens lie inside documents, whose text spells"
            " them: to Megatron a document ends there (--reset-position-ids, "
            "--reset-attention-mask, --eod-mask-loss)."
        )

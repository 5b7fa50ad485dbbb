"""`megatron-pd train-tokenizer`: a sentencepiece model from text."""

import argparse

from megatron_pd.cli.common import positive
from megatron_pd.cli.preprocess import add_input_arguments

HELP = "Train a sentencepiece BPE tokenizer that keeps every text (but U+2581, as a space)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=positive, required=True)
    parser.add_argument(
        "--max-bytes", type=positive, default=64 << 20, help="learn from this much text at most"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_pd.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        json_key=args.json_key,
        input_format=args.input_format,
        max_bytes=args.max_bytes,
    )
    print(f"{args.output}: {args.vocab_size:,} pieces")
    return 0

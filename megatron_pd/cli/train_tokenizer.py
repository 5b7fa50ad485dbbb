"""`megatron-pd train-tokenizer`: a sentencepiece model from text."""

import argparse

HELP = "Train a lossless sentencepiece BPE tokenizer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl and plain text files")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--json-key", default="text", help="where a JSON line holds its text")
    parser.add_argument(
        "--max-bytes", type=int, default=64 << 20, help="learn from this much text at most"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_pd.megatron import cpu

    cpu.install()
    from megatron_pd.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        json_key=args.json_key,
        max_bytes=args.max_bytes,
    )
    print(f"{args.output}: {args.vocab_size:,} pieces")
    return 0

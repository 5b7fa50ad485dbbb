"""`megatron-pd preprocess`: text → Megatron `.bin/.idx`."""

import argparse
import os

HELP = "Tokenize JSON-lines or plain text into a Megatron .bin/.idx corpus."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=".jsonl files (one document per line) and plain text files (one document each)",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--json-key", default="text", help="where a JSON line holds its text")
    parser.add_argument(
        "--tokenizer-type",
        default="SentencePieceTokenizer",
        help="one of Megatron's, e.g. SentencePieceTokenizer or HuggingFaceTokenizer",
    )
    parser.add_argument("--tokenizer-model", required=True, help=".model file, folder or HF name")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


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
        workers=args.workers,
    )
    print(
        f"{args.output_prefix}.bin/.idx: {summary.documents:,} documents, {summary.tokens:,} tokens"
        f" ({summary.empty_documents:,} empty documents left out)"
    )
    return 0

"""`megatron-pd convert`: stores from cached logits, answers of vLLM and Parquet, and to Parquet."""

import argparse
import sys
from pathlib import Path

from megatron_pd.cli.common import (
    add_codec_arguments,
    add_workers,
    positive,
    print_store,
    progress_bar,
)

HELP = (
    "Make a store from Megatron's cached logits, vLLM's answers or Parquet files, or Parquet from "
    "a store."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(required=True, metavar="direction", dest="direction")
    described = {
        "from-megatron": "a store from the tar shards that Megatron's --logits-save-dir wrote "
        "(takes the teacher run's Megatron flags)",
        "from-vllm": "a store from JSON lines of what vLLM answers where it is asked for "
        "prompt_logprobs (examples/ask_vllm.py asks). Interrupted, the same command goes on.",
        "to-parquet": "Parquet files from a store: a row per token with document, offset, ids, "
        "logprobs. Interrupted, the same command goes on with the next file.",
        "from-parquet": "a store from Parquet files. Interrupted, the same command goes on.",
    }
    directions = {
        name: subparsers.add_parser(name, help=text, description=text)
        for name, text in described.items()
    }
    _add_vllm_arguments(directions["from-vllm"])
    parser = directions["to-parquet"]
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument("--output", required=True, type=Path, help="folder of the new files")
    add_workers(parser)
    parser = directions["from-parquet"]
    parser.add_argument("files", nargs="+", type=Path, help="files, or folders of .parquet files")
    parser.add_argument("--output", required=True, type=Path, help="directory of the new store")
    parser.add_argument(
        "--corpus",
        help="prefix of the .bin/.idx corpus, which is compared with the digests in the files, and "
        "to which the store is bound",
    )
    parser.add_argument("--vocab-size", type=int, help="of files that to-parquet did not write")
    add_codec_arguments(parser)
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="files of JSON lines")
    parser.add_argument("--output", required=True, type=Path, help="directory of the new store")
    parser.add_argument(
        "--corpus", required=True, help="prefix of the .bin/.idx corpus that was asked about"
    )
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--vocab-size", type=positive, help="of the corpus's tokenizer")
    vocabulary.add_argument(
        "--tokenizer-model", help="the corpus's tokenizer; training then checks for it"
    )
    parser.add_argument(
        "--tokenizer-type",
        default="HuggingFaceTokenizer",
        help="Megatron's name for it; default: %(default)s",
    )
    parser.add_argument("--top-p", type=float, help="keep the top of every row with this mass")
    parser.add_argument("--top-k", type=positive, help="then so many entries of it at most")
    add_codec_arguments(parser)
    add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    return {
        "from-vllm": _from_vllm,
        "to-parquet": _to_parquet,
        "from-parquet": _from_parquet,
    }[args.direction](args)


def _from_vllm(args: argparse.Namespace) -> int:
    vocab_size, tokenizer = args.vocab_size, None
    if args.tokenizer_model is not None:
        from megatron_pd.megatron import cpu

        cpu.install()
        from megatron_pd.data.tokenizer import (
            open_tokenizer,
            tokenizer_config,
            tokenizer_fingerprint,
        )

        opened = open_tokenizer(tokenizer_config(args.tokenizer_type, args.tokenizer_model))
        vocab_size, tokenizer = opened.vocab_size, tokenizer_fingerprint(opened)
    from megatron_pd.data.corpus import MegatronCorpus
    from megatron_pd.teacher.served import from_vllm

    corpus = MegatronCorpus(args.corpus)
    with progress_bar(int(corpus.document_lengths.sum()), " tokens") as progress:
        store = from_vllm(
            args.files,
            args.output,
            corpus,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            top_p=args.top_p,
            top_k=args.top_k,
            codec=args.codec,
            value_bits=args.value_bits,
            workers=args.workers,
            progress=progress,
            note=lambda sentence: print(f"note: {sentence}", file=sys.stderr),
        )
    print_store(store, args.json)
    return 0


def _to_parquet(args: argparse.Namespace) -> int:
    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.parquet import to_parquet

    store = LogitStore(args.store)
    with progress_bar(store.num_rows) as progress:
        files = to_parquet(store, args.output, workers=args.workers, progress=progress)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.output}: {len(files):,} files, {store.num_rows:,} rows, {size:,} bytes")
    return 0


def _from_parquet(args: argparse.Namespace) -> int:
    from megatron_pd.store.admin.parquet import from_parquet

    corpus = None
    if args.corpus is not None:
        from megatron_pd.data.corpus import MegatronCorpus

        corpus = MegatronCorpus(args.corpus)
    with progress_bar(None) as progress:
        store = from_parquet(
            args.files,
            args.output,
            vocab_size=args.vocab_size,
            corpus=corpus,
            codec=args.codec,
            value_bits=args.value_bits,
            workers=args.workers,
            progress=progress,
            note=lambda sentence: print(f"note: {sentence}", file=sys.stderr),
        )
    print_store(store, args.json)
    return 0


def main() -> int:
    """`convert from-megatron`, which leaves the command line to Megatron's parser."""
    from megatron_pd.teacher.cached_logits.convert import main

    return main()

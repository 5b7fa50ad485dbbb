"""`megatron-pd inspect`: what a logit store holds, as text and histograms."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from megatron_pd.cli.common import positive

if TYPE_CHECKING:
    from megatron_pd.store import LogitStore

HELP = "Summarise a logit store, show the teacher's candidates at some tokens, plot histograms."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument("--document", type=int, help="show rows of this document")
    parser.add_argument("--offset", type=int, default=0, help="first token to show")
    parser.add_argument("--tokens", type=positive, default=16, help="how many tokens to show")
    parser.add_argument(
        "--top", type=positive, default=5, help="how many candidates of each to show"
    )
    parser.add_argument(
        "--corpus",
        help="prefix of the .bin/.idx corpus, to show its tokens too; default: that of a store "
        "PREFIX.pd which lies beside it",
    )
    parser.add_argument("--tokenizer-type", help="with --tokenizer-model: show tokens as text")
    parser.add_argument("--tokenizer-model", help=".model file, folder or Hugging Face name")
    parser.add_argument("--plot", help="write histograms of entry counts and kept mass to this PNG")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_pd.store import LogitStore
    from megatron_pd.store.admin.inspect import plot_histograms, summary, window

    store = LogitStore(args.store, allow_partial=True)
    figures = summary(store)
    if args.document is not None:
        span = (args.document, args.offset, args.tokens)
        figures["window"] = window(store, span, args.top, _corpus(args), _piece_of(args, store))
    if args.plot:
        plot_histograms(store, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        print(json.dumps(figures))
        return 0
    tokens = figures.pop("window", [])
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):22} {value}")
    if tokens:
        _print_window(tokens)
    return 0


def _corpus(args: argparse.Namespace) -> Any:
    prefix = args.corpus
    if prefix is None:
        prefix = os.path.normpath(args.store).removesuffix(".pd")
        if not os.path.isfile(f"{prefix}.bin"):
            return None
    from megatron_pd.data.corpus import MegatronCorpus

    return MegatronCorpus(prefix)


def _piece_of(args: argparse.Namespace, store: "LogitStore") -> Any:
    """Token id → its text, where a tokenizer is given."""
    if args.tokenizer_model is None:
        return None
    from megatron_pd.megatron import cpu

    cpu.install()
    from megatron_pd.data.tokenizer import open_tokenizer, tokenizer_config, tokenizer_fingerprint

    tokenizer = open_tokenizer(
        tokenizer_config(args.tokenizer_type or "SentencePieceTokenizer", args.tokenizer_model)
    )
    if store.metadata.get("tokenizer", tokenizer_fingerprint(tokenizer)) != tokenizer_fingerprint(
        tokenizer
    ):
        print(
            f"note: {args.tokenizer_model} is not the tokenizer that the store was made with.",
            file=sys.stderr,
        )
    return lambda token: tokenizer.detokenize([int(token)])


def _print_window(tokens: list[dict[str, Any]]) -> None:
    """A line per token; * marks the token that really follows."""

    def shown(id_: int, text: str | None) -> str:
        return str(id_) if text is None else repr(text)

    for entry in tokens:
        head = f"{entry['offset']:6}"
        if "token" in entry:
            head += f" {shown(entry['token'], entry.get('text')):>16} →"
        candidates = "  ".join(
            f"{shown(candidate['id'], candidate.get('text'))}"
            f"{'*' if candidate['id'] == entry.get('next_token') else ''} "
            f"{candidate['probability']:.3f}"
            for candidate in entry["candidates"]
        )
        print(f"{head} {entry['mass']:.3f} {entry['entries']:4}  {candidates or 'no teacher'}")

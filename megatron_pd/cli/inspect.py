"""`megatron-pd inspect`: what a logit store holds, as text and histograms."""

import argparse
import json

HELP = "Summarise a logit store, show the teacher's candidates at some tokens, plot histograms."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the store's directory, e.g. corpus.pd")
    parser.add_argument("--document", type=int, help="show rows of this document")
    parser.add_argument("--offset", type=int, default=0, help="first token to show")
    parser.add_argument("--tokens", type=int, default=16, help="how many tokens to show")
    parser.add_argument("--top", type=int, default=5, help="how many candidates of each to show")
    parser.add_argument("--corpus", help="prefix of the .bin/.idx corpus, to show its tokens too")
    parser.add_argument("--tokenizer-type", help="with --tokenizer-model: show tokens as text")
    parser.add_argument("--tokenizer-model", help=".model file, folder or Hugging Face name")
    parser.add_argument("--plot", help="write histograms of entry counts and kept mass to this PNG")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from megatron_pd.store import LogitStore
    from megatron_pd.store.inspect import summary, window

    store = LogitStore(args.store, allow_partial=True)
    figures = summary(store)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):22} {value}")
    if args.document is not None:
        span = (args.document, args.offset, args.tokens)
        print("\n".join(window(store, span, args.top, _corpus(args), _piece_of(args))))
    if args.plot:
        from megatron_pd.store.inspect import plot_histograms

        plot_histograms(store, args.plot)
        print(f"wrote {args.plot}")
    return 0


def _corpus(args: argparse.Namespace):
    if args.corpus is None:
        return None
    from megatron_pd.data.corpus import MegatronCorpus

    return MegatronCorpus(args.corpus)


def _piece_of(args: argparse.Namespace):
    """Token id → how to show it: quoted text where a tokenizer is given, else the number."""
    if args.tokenizer_model is None:
        return str
    from megatron_pd import cpu

    cpu.install()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    tokenizer = build_tokenizer(
        TokenizerConfig(
            tokenizer_type=args.tokenizer_type or "SentencePieceTokenizer",
            tokenizer_model=args.tokenizer_model,
            pad_vocab_size=False,
        )
    )
    return lambda token: repr(tokenizer.detokenize([int(token)]))

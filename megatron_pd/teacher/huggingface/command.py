"""`megatron-pd dump --hf-model`: a Hugging Face model's rows of corpora."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.tokenizer import (
    fingerprint_of,
    open_tokenizer,
    tokenizer_config,
    tokenizer_fingerprint,
)
from megatron_pd.errors import UserError
from megatron_pd.options import given_options
from megatron_pd.teacher.command import add_dump_arguments, checked_corpora, dump_corpora
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.huggingface.ids import check_ids
from megatron_pd.teacher.huggingface.source import Source
from megatron_pd.teacher.huggingface.teacher import HuggingFaceTeacher

__all__ = ["main", "tokenizer_of"]

_LONGEST_DEFAULT = 4096
_INSTEAD = {
    "--load": "--hf-model names the model",
    "--micro-batch-size": "--batch-tokens N is the tokens of a batch",
    "--bf16": "it is --dtype bfloat16",
    "--fp16": "it is --dtype float16",
    "--tensor-model-parallel-size": "every process holds the whole model",
    "--pipeline-model-parallel-size": "every process holds the whole model",
    "--trust-remote-code": "code of a model's folder is never run",
}


def main() -> int:
    """Entry point: reads `sys.argv`."""
    args = _parsed()
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what asks the hub about a folder, too
    source = Source.of(args.hf_model)
    _quiet()
    corpora = checked_corpora(args.data_path, args.dump_store)
    model_config = source.config()
    config = _config_of(args, model_config, source)
    vocab_size, tokenizer = _checked_tokenizer(args, source, corpora)
    teacher = HuggingFaceTeacher(
        source, model_config, dtype=args.dtype, vocab_size=vocab_size, tokenizer=tokenizer
    )
    dump_corpora(teacher, args.data_path, args.dump_store, config)
    return 0


def tokenizer_of(source: Source) -> tuple[Any, str]:
    """transformers' tokenizer, and the fingerprint that a run has whose --tokenizer-model is the
    model's folder, or what save_pretrained writes of the tokenizer of a GGUF file."""
    tokenizer = source.tokenizer()
    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if (source.folder / "tokenizer.json").is_file() or source.gguf is None:
        return tokenizer, fingerprint_of(len(tokenizer), eod, source.folder)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer, fingerprint_of(len(tokenizer), eod, Path(folder))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a Hugging Face model over corpora and write their logit stores. Under "
        "torchrun every process is a replica, on a GPU of its own, and takes shards as they come. "
        "The same command goes on with a dump that was stopped.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--hf-model",
        required=True,
        metavar="FOLDER",
        help="with config.json, safetensors and tokenizer, as save_pretrained writes it; or a "
        ".gguf file (needs megatron-pd[gguf]). Nothing is fetched, and no code of it is run",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and arithmetic; default: that of the files, float32 of GGUF",
    )
    group.add_argument(
        "--seq-length",
        type=int,
        help="most tokens that the model sees at once; default: its max_position_embeddings, at "
        f"most {_LONGEST_DEFAULT:,}",
    )
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        help="tokens that the model reads at once, at least one window of --seq-length; changes "
        "rows by rounding at most; default: %(default)s",
    )
    group = parser.add_argument_group("corpus")
    group.add_argument(
        "--data-path", nargs="+", required=True, metavar="PREFIX", help="of a .bin/.idx; or several"
    )
    group.add_argument(
        "--tokenizer-model",
        help="with which the corpus was made and the student is trained, where it isn't the "
        "model's own folder; both must give the same ids",
    )
    group.add_argument(
        "--tokenizer-type", help="Megatron's name for it; default: HuggingFaceTokenizer"
    )
    add_dump_arguments(parser).add_argument(
        "--seed", type=int, default=1234, help="of --dump-sampled; default: %(default)s"
    )
    args, unknown = parser.parse_known_args()
    if unknown:
        name = unknown[0].partition("=")[0]
        instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise UserError(
            f"{name} is no flag of a dump with --hf-model{instead}. --help with --hf-model lists "
            "what there is; Megatron's flags are for Megatron's checkpoints (--load)."
        )
    if args.tokenizer_type and not args.tokenizer_model:
        raise UserError("--tokenizer-type describes --tokenizer-model, which is not given.")
    return args


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _config_of(args: argparse.Namespace, model_config: Any, source: Source) -> DumpConfig:
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length = args.seq_length
    if length is None:
        length = min(longest or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    elif length < 1 or (longest is not None and length > longest):
        raise UserError(
            f"--seq-length is {length}; it must be at least 1 and, for {source}, at most "
            f"{longest} (max_position_embeddings)."
        )
    if args.batch_tokens < 1:
        raise UserError(f"--batch-tokens is {args.batch_tokens}; give 1 or more.")
    config = DumpConfig(
        sequence_length=length,
        batch_size=max(1, args.batch_tokens // length),
        seed=args.seed,
        **given_options(args, DumpConfig, "dump"),
    )
    if config.context != "document":
        raise UserError(
            f"--dump-context {config.context} needs a Megatron teacher, which knows the order of "
            "training: `megatron-pd import-hf` makes one of the folder."
        )
    return config


def _checked_tokenizer(
    args: argparse.Namespace, source: Source, corpora: list[MegatronCorpus]
) -> tuple[int, str]:
    """Vocabulary size and fingerprint of the corpora's tokenizer, which is the teacher's."""
    tokenizer, fingerprint = tokenizer_of(source)
    given = None
    if args.tokenizer_model is not None:
        from megatron_pd.megatron import cpu

        cpu.install()
        given = open_tokenizer(
            tokenizer_config(args.tokenizer_type or "HuggingFaceTokenizer", args.tokenizer_model)
        )
    for corpus in corpora:
        check_ids(corpus, tokenizer, given, str(source))
    if given is None:
        return len(tokenizer), fingerprint
    return given.vocab_size, tokenizer_fingerprint(given)

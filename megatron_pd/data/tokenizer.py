"""Megatron's tokenizers outside a training run, and what tells them apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pd.errors import UserError

if TYPE_CHECKING:
    from megatron.training.config import TokenizerConfig

__all__ = [
    "batch_encoder",
    "fingerprint_of",
    "largest_id",
    "open_tokenizer",
    "tokenizer_config",
    "tokenizer_fingerprint",
]

# What a faster way to the same ids is tried with: whitespace, scripts, words that may be special.
_PROBES = ["", "a", " a  b\n\tc\r\n", "ÄÖ é 日本語 🙂", "</s><s><|endoftext|>[SEP] x"]


def tokenizer_config(tokenizer_type: str, tokenizer_model: str) -> TokenizerConfig:
    """Megatron's description of a tokenizer, by its --tokenizer-type and --tokenizer-model."""
    from megatron.training.config import TokenizerConfig

    return TokenizerConfig(
        tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, pad_vocab_size=False
    )


def open_tokenizer(config: TokenizerConfig) -> Any:
    """Megatron's tokenizer of this description.

    Raises:
        UserError: it can't be opened, or has no end-of-document token.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    model = config.tokenizer_model
    is_file = config.tokenizer_type != "HuggingFaceTokenizer"  # which may be a hub's name
    if is_file and model is not None and not os.path.exists(model):
        raise UserError(
            f"--tokenizer-model {model} does not exist: train one with "
            "`megatron-pd train-tokenizer`, or name the one that the model uses."
        )
    try:
        tokenizer = build_tokenizer(config)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer-model {model} cannot be opened as a {config.tokenizer_type} ({error}): "
            "give the file, folder or name of one, and its --tokenizer-type."
        ) from error
    if tokenizer.eod is None or tokenizer.eod < 0:
        raise UserError(
            f"The tokenizer {config.tokenizer_model} has no end-of-document token, without which "
            "documents run into one another: use one that defines </s> (EOS)."
        )
    if tokenizer.eod >= tokenizer.vocab_size:
        raise UserError(
            f"The tokenizer {config.tokenizer_model} ends documents with token {tokenizer.eod}, "
            f"but says that it has {tokenizer.vocab_size:,} tokens, so Megatron's models have no "
            "such token: number its vocabulary without holes."
        )
    return tokenizer


def largest_id(tokenizer: Any) -> int:
    """The largest token id: vocab_size - 1 unless the ids have holes."""
    vocabulary = getattr(_library_tokenizer(tokenizer), "get_vocab", None)
    return max([tokenizer.vocab_size - 1, *(vocabulary().values() if vocabulary else ())])


def batch_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """What gives the ids of `tokenizer.tokenize` for many texts at once, in one thread.

    transformers spends a third of a call beside its fast tokenizers' own work, which is then asked
    for directly.
    """

    def one_by_one(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.tokenize(text) for text in texts]

    backend = getattr(_library_tokenizer(tokenizer), "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        return one_by_one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def at_once(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    # A first call sets the backend up; what Megatron and transformers do beside it shows.
    expected = one_by_one(_PROBES)
    limited = backend.truncation or backend.padding
    return one_by_one if limited or at_once(_PROBES) != expected else at_once


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a Megatron tokenizer's content, the same wherever its files lie.

    Covers the vocabulary size, the end-of-document id, and the bytes of the model file (or, for a
    folder, of its `tokenizer.json`). A tokenizer without files is known by its first two alone.
    """
    path = getattr(tokenizer, "path", None)
    return fingerprint_of(tokenizer.vocab_size, tokenizer.eod, Path(path) if path else None)


def fingerprint_of(vocab_size: int, eod: int | None, path: Path | None) -> str:
    """`tokenizer_fingerprint` of what Megatron would open from a file or folder."""
    digest = hashlib.sha256(f"{vocab_size} {eod}".encode())
    for file in () if path is None else (path, path / "tokenizer.json"):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _library_tokenizer(tokenizer: Any) -> Any:
    """What Megatron's tokenizer wraps, for example transformers'."""
    return getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)

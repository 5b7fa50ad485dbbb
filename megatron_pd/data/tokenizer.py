"""Megatron's tokenizers outside a training run, and what tells them apart."""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.config import TokenizerConfig

from megatron_pd.errors import UserError

__all__ = ["open_tokenizer", "tokenizer_config", "tokenizer_fingerprint"]


def tokenizer_config(tokenizer_type: str, tokenizer_model: str) -> TokenizerConfig:
    """Megatron's description of a tokenizer, by its --tokenizer-type and --tokenizer-model."""
    return TokenizerConfig(
        tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, pad_vocab_size=False
    )


def open_tokenizer(config: TokenizerConfig) -> Any:
    """Megatron's tokenizer of this description.

    Raises:
        UserError: it can't be opened, or has no end-of-document token.
    """
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
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a Megatron tokenizer's content, the same wherever its files lie.

    Covers the vocabulary size, the end-of-document id, and the bytes of the model file (or, for a
    folder, of its `tokenizer.json`). A tokenizer without files is known by its first two alone.
    """
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.eod}".encode())
    path = Path(getattr(tokenizer, "path", None) or "")
    for file in (path, path / "tokenizer.json"):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

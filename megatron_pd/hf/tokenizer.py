"""The tokenizer that goes along with a model, and what else of a folder Megatron has no use for."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pd.errors import UserError
from megatron_pd.hf.checkpoint import TOKENIZER_FOLDER
from megatron_pd.hf.config import is_usable
from megatron_pd.hf.weights import read_json

# isort: split
# Megatron may be imported only after hf.checkpoint has prepared the device.
from megatron_pd.data.tokenizer import open_tokenizer, tokenizer_config

__all__ = [
    "CONFIG",
    "HUGGING_FACE",
    "Companions",
    "companions_of",
    "copy_companions",
    "has_tokenizer",
]

CONFIG = "config.json"
HUGGING_FACE = "HuggingFaceTokenizer"
_SENTENCEPIECE = "SentencePieceTokenizer"
_SENTENCEPIECE_TYPES = (_SENTENCEPIECE, "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_GENERATION_CONFIG = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_COMPANIONS = (
    *_TOKENIZERS,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    _GENERATION_CONFIG,
)
# What a converted sentencepiece model is tried with: whitespace, scripts, code, special words.
_PROBES = (
    " a  b\n\tc\r\n",
    "ÄÖ é 日本語 🙂 ﬁ½",
    "def f(x):\n    if x:\n        return [x, -1.5e3]\n\n\n",
    "</s><s> <unk>▁x",
    "The quick brown fox jumps over 13 lazy dogs.",
)


@dataclass(frozen=True)
class Companions:
    """What goes into a Hugging Face folder beside the weights."""

    vocab_size: int
    config: Mapping[str, Any]
    """A config.json of the same tokenizer's, or the token ids that one has."""
    folder: Path | None = None
    """A Hugging Face folder with the tokenizer."""
    sentencepiece: Path | None = None
    notes: list[str] = field(default_factory=list)
    """What `write` found that the user should know, one sentence each."""

    def write(self, folder: Path) -> None:
        """The tokenizer's files and generation_config.json."""
        if self.folder is not None:
            copy_companions(self.folder, folder)
        if self.sentencepiece is not None:
            self._write_sentencepiece(self.sentencepiece, folder)
        if self.sentencepiece is None and not has_tokenizer(folder):
            self.notes.append("The checkpoint has no tokenizer, and so the folder has none.")
        ids = {
            name: self.config[name]
            for name in ("bos_token_id", "eos_token_id")
            if self.config.get(name) is not None
        }
        if ids and not (folder / _GENERATION_CONFIG).exists():
            (folder / _GENERATION_CONFIG).write_text(json.dumps(ids, indent=2) + "\n")

    def _write_sentencepiece(self, model: Path, folder: Path) -> None:
        shutil.copyfile(model, folder / "tokenizer.model")
        converted = _converted(model)
        if converted is None:
            self.notes.append(
                f"The tokenizer {model} went along as tokenizer.model alone: the package "
                "transformers is missing, or makes other ids of it."
            )
            return
        for name, content in converted.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def copy_companions(source: Path, target: Path) -> None:
    """The tokenizer's files and the generation config, as far as they are there."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def companions_of(args: Any, load: Path, given: Path | None, rows: int) -> Companions:
    """What goes along with a checkpoint's model.

    Args:
        args: of the checkpoint.
        load: the checkpoint.
        given: a tokenizer in place of the one that `args` name.
        rows: of the embeddings, padding included.
    Raises:
        UserError: the tokenizer is not found, or has more tokens than the model.
    """
    kind, model = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if given is not None:
        kind, model = (HUGGING_FACE if given.is_dir() else _SENTENCEPIECE), str(given)
    if model is None:
        found = _without_tokenizer(args, load, kind)
    else:
        found = _with_tokenizer(kind, Path(model), "--tokenizer" if given else f"--load {load}")
    if found.vocab_size > rows:
        raise UserError(
            f"The tokenizer {model} has {found.vocab_size:,} tokens and the model {rows:,} rows of "
            "embeddings: give the model's own by --tokenizer."
        )
    kept = found.config.get("vocab_size", 0)
    if type(kept) is int and found.vocab_size <= kept <= rows:  # rows that no token has yet
        return Companions(kept, found.config, found.folder, found.sentencepiece)
    return found


def _with_tokenizer(kind: str | None, model: Path, flag: str) -> Companions:
    if kind != HUGGING_FACE and kind not in _SENTENCEPIECE_TYPES:
        raise UserError(
            f"{flag} has a {kind}, which has no form in a Hugging Face folder: give --tokenizer a "
            "Hugging Face folder or a sentencepiece model of the same ids."
        )
    if not model.exists():
        raise UserError(
            f"{flag} has the tokenizer {model}, which is not there (any more): give its folder or "
            "its .model file by --tokenizer."
        )
    tokenizer = open_tokenizer(tokenizer_config(kind, str(model)))
    bos = getattr(tokenizer, "bos", None)
    ids = {
        "bos_token_id": bos if isinstance(bos, int) and bos >= 0 else None,
        "eos_token_id": tokenizer.eod,
    }
    if kind != HUGGING_FACE:
        return Companions(tokenizer.vocab_size, ids, sentencepiece=model)
    kept = read_json(model / CONFIG) if (model / CONFIG).is_file() else {}
    config = kept if is_usable(kept) else ids
    return Companions(tokenizer.vocab_size, config, folder=model)


def _without_tokenizer(args: Any, load: Path, kind: str | None) -> Companions:
    """An import of a folder that has none, or a run on a NullTokenizer."""
    vocab_size = getattr(args, "vocab_size", None)
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(
            f"--load {load} names no tokenizer, so how many of its embeddings are padding is not "
            "known: give --tokenizer a Hugging Face folder or a sentencepiece model."
        )
    folder = load / TOKENIZER_FOLDER
    if kind is not None or not (folder / CONFIG).is_file():
        return Companions(vocab_size, {})
    kept = read_json(folder / CONFIG)
    return Companions(vocab_size, kept if is_usable(kept) else {}, folder=folder)


# -------------------------------------------------------------------------------- sentencepiece


def _converted(model: Path) -> dict[str, Any] | None:
    """File name → content of a tokenizer that transformers loads, whose ids are sentencepiece's;
    None where there is none."""
    import sentencepiece

    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    special = {
        name: pieces.id_to_piece(number)
        for name, number in {
            "bos_token": pieces.bos_id(),
            "eos_token": pieces.eos_id(),
            "unk_token": pieces.unk_id(),
            "pad_token": pieces.pad_id(),
        }.items()
        if number >= 0
    }
    for add_prefix_space in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            shutil.copyfile(model, folder / "tokenizer.model")
            options = {"add_bos_token": False, "add_eos_token": False, "legacy": False, **special}
            (folder / "tokenizer_config.json").write_text(
                json.dumps(
                    {
                        "tokenizer_class": "LlamaTokenizer",
                        "add_prefix_space": add_prefix_space,
                        **options,
                    }
                )
            )
            content = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
            # sentencepiece turns spaces into U+2581 first, and never finds these.
            content["added_tokens"] = [
                token for token in content["added_tokens"] if " " not in token["content"]
            ]
            files = {
                "tokenizer.json": content,
                "tokenizer_config.json": {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": False,
                    **special,
                },
            }
            (folder / "tokenizer.model").unlink()
            for name, value in files.items():
                (folder / name).write_text(json.dumps(value))
            made = AutoTokenizer.from_pretrained(folder)
            if all(
                made(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
                for text in _PROBES
            ):
                return files
    return None

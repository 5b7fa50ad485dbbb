"""The tokenizer that goes along with a model, and what else of a folder Megatron has no use for."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

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
# What a tokenizer in a new place is tried with: whitespace, scripts, code, special words.
_PROBES = (
    " a  b\n\tc\r\n",
    "ÄÖ é 日本語 🙂 ﬁ½",
    "def f(x):\n    if x:\n        return [x, -1.5e3]\n\n\n",
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
        """The tokenizer's files and generation_config.json, into a folder with its config.json."""
        if self.folder is not None:
            copy_companions(self.folder, folder)
        if self.sentencepiece is not None:
            self._write_sentencepiece(self.sentencepiece, folder)
        elif not has_tokenizer(folder):
            self.notes.append("The checkpoint has no tokenizer, and so the folder has none.")
        elif self.folder is not None and not _has_ids_of(folder, _encoder(self.folder)):
            self.notes.append(
                f"In the new folder transformers makes other ids of the tokenizer than in "
                f"{self.folder}, as it goes by config.json's model_type: load it by "
                "PreTrainedTokenizerFast.from_pretrained, or from there."
            )
        ids = {
            name: self.config[name]
            for name in ("bos_token_id", "eos_token_id")
            if self.config.get(name) is not None
        }
        if ids and not (folder / _GENERATION_CONFIG).exists():
            (folder / _GENERATION_CONFIG).write_text(json.dumps(ids, indent=2) + "\n")

    def _write_sentencepiece(self, model: Path, folder: Path) -> None:
        shutil.copyfile(model, folder / "tokenizer.model")
        for content in _converted(model):
            for name, value in content.items():
                (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
            if _has_ids_of(folder, SentencePieceProcessor(model_file=str(model)).encode):
                return
            for name in content:
                (folder / name).unlink()
        self.notes.append(
            f"The tokenizer {model} went along as tokenizer.model alone: transformers is missing, "
            "or makes other ids of it."
        )


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


# ------------------------------------------------------------------------------- transformers

Encoder = Callable[[str], list[int]]


def _encoder(folder: Path) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def _has_ids_of(folder: Path, encode: Encoder) -> bool:
    try:
        own = _encoder(folder)
    except Exception:  # of whatever kind transformers' classes raise that don't fit the files
        return False
    return all(own(text) == encode(text) for text in _PROBES)


def _converted(model: Path) -> Iterator[dict[str, Any]]:
    """What may give a sentencepiece model's ids in transformers: file name → JSON."""
    try:
        from transformers import LlamaTokenizer
    except ImportError:
        return
    pieces = SentencePieceProcessor(model_file=str(model))
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
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(model, Path(scratch) / "tokenizer.model")
        made = LlamaTokenizer.from_pretrained(scratch, legacy=False, **special)
    base = json.loads(made.backend_tokenizer.to_str())
    # Less what sentencepiece never finds, as it turns spaces into U+2581 first, or doesn't have.
    base["added_tokens"] = [
        token
        for token in base["added_tokens"]
        if " " not in token["content"] and token["id"] < pieces.get_piece_size()
    ]
    for prefix in ([], [{"type": "Prepend", "prepend": "▁"}]):
        yield {
            "tokenizer.json": {
                **base,
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        *prefix,
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                },
                "pre_tokenizer": None,
                "post_processor": None,  # would add BOS
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        *({"type": "Strip", "content": " ", "start": 1, "stop": 0} for _ in prefix),
                    ],
                },
            },
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **special,
            },
        }

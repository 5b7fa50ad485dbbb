"""A sentencepiece model trained on the documents of a corpus."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from megatron_pd.data.preprocess import read_documents
from megatron_pd.errors import UserError

__all__ = ["train_tokenizer"]

# Whitespace carries meaning in source code, and sentencepiece drops it unless it is a symbol.
_WHITESPACE_SYMBOLS = ["\n", "\t", "    "]
_MAX_LINE_BYTES = 4096


def train_tokenizer(
    paths: Sequence[str],
    model_path: str,
    vocab_size: int,
    *,
    json_key: str = "text",
    max_bytes: int = 64 << 20,
) -> None:
    """Train a lossless BPE model (byte fallback, no normalisation) and write `model_path`.

    Args:
        max_bytes: of text to learn from; what comes after it in `paths` is not read.
    Raises:
        UserError: too little text for the vocabulary, or an output that is not a `.model` file.
    """
    output = Path(model_path)
    if output.suffix != ".model":
        raise UserError(f"--output {model_path}: a sentencepiece model ends in .model.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(paths, json_key, max_bytes),
            model_prefix=str(unfinished),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=_WHITESPACE_SYMBOLS,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece could not learn {vocab_size} pieces from {', '.join(paths)} ({error}): "
            "give more text or a smaller --vocab-size (byte fallback alone takes 263)."
        ) from error
    os.replace(f"{unfinished}.model", output)
    os.replace(f"{unfinished}.vocab", output.with_suffix(".vocab"))


def _lines(paths: Sequence[str], json_key: str, max_bytes: int) -> Iterator[str]:
    read = 0
    documents = read_documents(paths, json_key)
    for text, num_bytes in tqdm(documents, desc="train tokenizer", unit=" documents"):
        yield from itertools.chain.from_iterable(
            (line[i : i + 1024] for i in range(0, len(line), 1024)) for line in text.split("\n")
        )
        read += num_bytes
        if read >= max_bytes:
            return

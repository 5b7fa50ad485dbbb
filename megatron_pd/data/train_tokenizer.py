"""A sentencepiece model trained on the documents of a corpus."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from megatron_pd.data.documents import open_sources, read_documents
from megatron_pd.errors import UserError, if_stopped
from megatron_pd.workers import ordered_map, stops_wait

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
    input_format: str | None = None,
    max_bytes: int = 64 << 20,
) -> None:
    """Train a BPE model with byte fallback and no normalisation, and write `model_path`.

    Decoding gives back every text but for U+2581, as which sentencepiece writes spaces: it comes
    back as a space.

    Args:
        paths, json_key, input_format: as `preprocess` takes them.
        max_bytes: of text to learn from, in UTF-8; what comes after it in `paths` is not read.
    Raises:
        UserError: input that cannot be read, too little text for the vocabulary, or an output that
            is not a `.model` file or is an input.
        OSError: of reading or writing; `filename` is the file.
    """
    output = Path(model_path)
    vocabulary = output.with_suffix(".vocab")
    if output.suffix != ".model":
        raise UserError(f"--output {model_path}: a sentencepiece model ends in .model.")
    open_sources(paths, input_format)
    for path in paths:
        if any(file.exists() and file.samefile(path) for file in (output, vocabulary)):
            raise UserError(
                f"--output {model_path} would replace {path}, an input: choose another name."
            )
    output.parent.mkdir(parents=True, exist_ok=True)

    def train(name: str) -> bytes:
        lines = _lines(paths, json_key, input_format, max_bytes)
        return _trained(lines, vocab_size, ", ".join(paths))

    # sentencepiece listens to no signal until it is done: a process of its own can be ended.
    with (
        if_stopped("no tokenizer was written, an earlier one stays"),
        contextlib.closing(ordered_map(train, [model_path], 1)) as models,
    ):
        model = next(models)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines_of_vocabulary = (
        f"{pieces.id_to_piece(number)}\t{pieces.get_score(number):g}\n"
        for number in range(len(pieces))
    )
    with stops_wait():
        _write(vocabulary, "".join(lines_of_vocabulary).encode())
        _write(output, model)


def _trained(lines: Iterator[str], vocab_size: int, source: str) -> bytes:
    model = io.BytesIO()
    failures: list[BaseException] = []  # of reading, which sentencepiece makes RuntimeErrors of

    def sentences() -> Iterator[str]:
        try:
            yield from lines
        except BaseException as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
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
        if failures:
            raise failures[0] from None
        raise UserError(
            f"sentencepiece could not learn {vocab_size} pieces from {source} ({error}): give "
            "more text or a smaller --vocab-size (byte fallback alone takes 263)."
        ) from error
    return model.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Writes the file as a whole or not at all. Raises OSError with its name."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(unfinished)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _lines(
    paths: Sequence[str], json_key: str, input_format: str | None, max_bytes: int
) -> Iterator[str]:
    read = 0
    documents = read_documents(paths, json_key, input_format)
    for document in tqdm(documents, "train tokenizer", unit=" documents", disable=None):
        for line in (document.text or "").split("\n"):
            yield from (line[i : i + 1024] for i in range(0, len(line), 1024))
        read += len((document.text or "").encode())
        if read >= max_bytes:
            return

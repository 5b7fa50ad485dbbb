"""Text → Megatron `.bin/.idx`: documents of any format, tokenized in parallel.

This process reads blocks of documents and writes tokens, both without looking at a single document;
workers parse and tokenize them. The documents keep their order, so the corpus does not depend on
the number of workers. The `.idx` file appears last: a corpus that can be opened is complete.
"""

import contextlib
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from tqdm import tqdm

from megatron_pd.data.corpus_writer import CorpusWriter
from megatron_pd.data.documents import Block, blocks, open_sources
from megatron_pd.data.index import bin_path, idx_path
from megatron_pd.data.tokenizer import batch_encoder, largest_id, open_tokenizer
from megatron_pd.errors import UserError
from megatron_pd.workers import ordered_map

__all__ = ["CorpusSummary", "preprocess"]

_SECONDS_A_LINE = 60.0


class CorpusSummary(NamedTuple):
    """What became of the documents.

    Attributes:
        documents, tokens: in the corpus, the end-of-document tokens among them.
        empty_documents: left out: no text, or none that gives a token.
        replaced_documents: had bytes that are not UTF-8 or lone surrogates, which became U+FFFD.
        first_replaced: where the first of those lies.
        inner_ends: end-of-document tokens that are not a document's last.
    """

    documents: int
    tokens: int
    empty_documents: int
    replaced_documents: int = 0
    first_replaced: str | None = None
    inner_ends: int = 0


def preprocess(
    paths: Sequence[str],
    output_prefix: str,
    tokenizer_config: Any,
    *,
    json_key: str = "text",
    input_format: str | None = None,
    workers: int = 1,
) -> CorpusSummary:
    """Tokenize documents and write `<output_prefix>.bin/.idx`, each ended by one EOD token.

    Args:
        paths: files of any of `documents.FORMATS`, in the order that their documents shall have.
        tokenizer_config: as `data.tokenizer.tokenizer_config` makes it.
        json_key: the member of a JSON line, or the Parquet column, that is the text.
        input_format: of all files; by default of each by its name or content.
        workers: tokenizing processes.
    Raises:
        UserError: input that cannot be read, a tokenizer without an end-of-document token or with
            ids beyond its vocabulary, an output that is in the way.
        ChildProcessError: a worker was killed.
        OSError: of reading or writing; `filename` is the file.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more.")
    sources = open_sources(paths, input_format)
    _check_output(output_prefix, paths)
    tokenizer = open_tokenizer(tokenizer_config)
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(largest_id(tokenizer) + 1)
    empty = inner_ends = replaced = 0
    first_replaced = None
    pending: deque[int] = deque()  # bytes of files read for each block that has no result yet

    def drawn() -> Iterator[Block]:
        for block, num_bytes in blocks(sources, json_key):
            pending.append(num_bytes)
            yield block

    with (
        CorpusWriter(output_prefix, dtype) as writer,
        _progress(sum(source.size for source in sources)) as advance,
        contextlib.closing(
            ordered_map(_encoder(tokenizer, dtype), drawn(), workers)
        ) as encoded_blocks,
    ):
        for encoded in encoded_blocks:
            writer.append(encoded.tokens, encoded.lengths)
            empty += encoded.empty
            inner_ends += encoded.inner_ends
            replaced += encoded.replaced
            first_replaced = first_replaced or encoded.first_replaced
            advance(pending.popleft(), writer.documents, writer.tokens)
        if writer.documents == 0:
            raise UserError(f"No text was found in {', '.join(paths)}: nothing to tokenize.")
        writer.publish()
        return CorpusSummary(
            writer.documents, writer.tokens, empty, replaced, first_replaced, inner_ends
        )


def _check_output(prefix: str, inputs: Sequence[str]) -> None:
    if not os.path.basename(prefix):
        raise UserError(f"--output-prefix {prefix} is a folder: add the name of the corpus.")
    for output in (bin_path(prefix), idx_path(prefix)):
        if os.path.isdir(output):
            raise UserError(f"--output-prefix {prefix}: {output} is a folder; choose another name.")
        for path in inputs:
            if os.path.exists(output) and os.path.samefile(path, output):
                raise UserError(
                    f"--output-prefix {prefix} would replace {path}, an input: choose another name."
                )


# --- what a worker does ---------------------------------------------------------------------------


class _Encoded(NamedTuple):
    """A block's documents: tokens of all of them, in the corpus's dtype, and int32 lengths."""

    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    replaced: int
    first_replaced: str | None
    inner_ends: int


def _encoder(tokenizer: Any, dtype: type[np.number]) -> Callable[[Block], _Encoded]:
    encode = batch_encoder(tokenizer)
    eod, vocab_size = tokenizer.eod, tokenizer.vocab_size
    nothing = _without_ends(list(tokenizer.tokenize("")), eod)  # perhaps a BOS

    def encode_block(block: Block) -> _Encoded:
        documents = list(block.documents())
        texts = [document.text for document in documents if document.text]
        replaced = [document.number for document in documents if document.replaced]
        tokens, lengths = array("q"), array("i")
        for ids in _encode(encode, texts, block):
            ids = _without_ends(ids, eod)
            if ids and ids != nothing:
                ids.append(eod)
                tokens.fromlist(ids)
                lengths.append(len(ids))
        all_tokens = np.frombuffer(tokens, np.int64)
        if len(tokens) and not 0 <= all_tokens.min() <= all_tokens.max() < vocab_size:
            wrong = all_tokens[(all_tokens < 0) | (all_tokens >= vocab_size)][0]
            raise UserError(
                f"{block}: the tokenizer gives a token {wrong}, but says that it has {vocab_size:,}"
                " tokens, so Megatron's models have no such token: number its vocabulary without "
                "holes."
            )
        return _Encoded(
            all_tokens.astype(dtype),
            np.frombuffer(lengths, np.int32),
            empty=len(documents) - len(lengths),
            replaced=len(replaced),
            first_replaced=block.place(replaced[0]) if replaced else None,
            inner_ends=int((all_tokens == eod).sum()) - len(lengths),
        )

    return encode_block


def _encode(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str], block: Block
) -> list[list[int]]:
    try:
        return encode(texts)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise UserError(f"{block}: the tokenizer failed ({error}).") from error


def _without_ends(ids: list[int], eod: int) -> list[int]:
    """Without the EODs that a tokenizer's post-processor, or the text itself, ended it with."""
    while ids and ids[-1] == eod:
        ids.pop()
    return ids


# --- progress -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int, int], None]]:
    """Yields what takes the bytes that were done, and how many documents and tokens there are.

    A bar on a terminal, else a line a minute.
    """
    on_terminal = sys.stderr.isatty()
    done = 0
    last = time.monotonic()

    with tqdm(
        total=total, unit="B", unit_scale=True, desc="preprocess", disable=not on_terminal
    ) as bar:

        def advance(num_bytes: int, documents: int, tokens: int) -> None:
            nonlocal done, last
            done += num_bytes
            bar.set_postfix(documents=documents, tokens=tokens, refresh=False)
            bar.update(num_bytes)
            if not on_terminal and time.monotonic() - last >= _SECONDS_A_LINE:
                last = time.monotonic()
                print(
                    f"preprocess: {done / max(1, total):.1%} of the input, {documents:,} "
                    f"documents, {tokens:,} tokens",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance

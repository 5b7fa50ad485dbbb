"""Text → Megatron `.bin/.idx`: one document per JSON line or per text file, tokenized in parallel.

The reader yields documents in order, a pool of processes tokenizes them, and the parent writes
them in the same order, so the corpus does not depend on the number of workers. The `.idx` file
appears last: a corpus that can be opened is complete.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from tqdm import tqdm

from megatron_pd.data.tokenizer import open_tokenizer
from megatron_pd.errors import UserError

__all__ = ["CorpusSummary", "preprocess", "read_documents"]


class CorpusSummary(NamedTuple):
    documents: int
    tokens: int
    empty_documents: int


def read_documents(paths: Sequence[str], json_key: str = "text") -> Iterator[tuple[str, int]]:
    """Yield (text, bytes read for it) of every document.

    A `.jsonl` or `.json` file holds one document per line, under `json_key`; any other file is one
    document of plain UTF-8 text.

    Raises:
        UserError: names the file and line that cannot be read.
    """
    for path in paths:
        if Path(path).suffix in (".jsonl", ".json"):
            yield from _read_json_lines(path, json_key)
        else:
            try:
                yield Path(path).read_text(encoding="utf-8"), os.path.getsize(path)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error}): convert it first.") from error


def _read_json_lines(path: str, json_key: str) -> Iterator[tuple[str, int]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record[json_key]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with the text under "
                    f"{json_key!r}; fix the line, or name another key with --json-key."
                ) from error
            yield text, len(line)


def preprocess(
    paths: Sequence[str],
    output_prefix: str,
    tokenizer_config: Any,
    *,
    json_key: str = "text",
    workers: int = 1,
) -> CorpusSummary:
    """Tokenize documents and write `<output_prefix>.bin/.idx`, each ended by the EOD token.

    Args:
        paths: text and JSON-lines files, in the order that their documents shall have.
        tokenizer_config: as `data.tokenizer.tokenizer_config` makes it.
        workers: tokenizing processes.
    Raises:
        UserError: input that cannot be read, or a tokenizer without an end-of-document token.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"--input {path} does not exist or is not a file.")
    tokenizer = open_tokenizer(tokenizer_config)
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    unfinished = f"{output_prefix}.unfinished"
    builder = IndexedDatasetBuilder(
        get_bin_path(unfinished), dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    documents = tokens = empty = 0
    context = multiprocessing.get_context("fork")
    progress = tqdm(
        total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True, desc="preprocess"
    )
    try:
        with (
            progress,
            context.Pool(workers, _start_worker, (tokenizer_config,)) as pool,
        ):
            texts = read_documents(paths, json_key)
            for ids, num_bytes in pool.imap(_tokenize, texts, chunksize=16):
                progress.update(num_bytes)
                if len(ids) == 0:
                    empty += 1
                    continue
                builder.add_document(ids, [len(ids)])
                documents += 1
                tokens += len(ids)
                progress.set_postfix(documents=documents, tokens=tokens, refresh=False)
        if documents == 0:
            raise UserError(f"No text was found in {', '.join(paths)}: nothing to tokenize.")
        builder.finalize(get_idx_path(unfinished))
        os.replace(get_bin_path(unfinished), get_bin_path(output_prefix))
        os.replace(get_idx_path(unfinished), get_idx_path(output_prefix))
    finally:
        for leftover in (get_bin_path(unfinished), get_idx_path(unfinished)):
            Path(leftover).unlink(missing_ok=True)
    return CorpusSummary(documents, tokens, empty)


_worker_tokenizer: Any = None


def _start_worker(config: Any) -> None:
    # The pool ends its workers by SIGTERM. A Python handler, inherited from the command, may come
    # just before a worker waits for the next documents and then never run: the pool would wait for
    # ever. Ctrl-C is for the parent to answer.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _worker_tokenizer
    _worker_tokenizer = open_tokenizer(config)


def _tokenize(document: tuple[str, int]) -> tuple[np.ndarray, int]:
    text, num_bytes = document
    ids = _worker_tokenizer.tokenize(text) if text else []
    if len(ids) > 0:
        ids = [*ids, _worker_tokenizer.eod]
    return np.asarray(ids, dtype=np.int32), num_bytes

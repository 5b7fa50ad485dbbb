"""What vLLM answers where it is asked for `prompt_logprobs` → a logit store.

A file has a JSON object a line, one for each prompt; `examples/ask_vllm.py` writes such files:

    document   int, of the corpus; the prompt is a piece of it
    start      int, the offset of the prompt's first token in it; 0 where it is not given
    top_k      int, the `prompt_logprobs` that was asked for; where it is not given, --top-k is
    response   a completion of vLLM's OpenAI-style server, with one choice. Or instead of it, the
               fields of a RequestOutput of `LLM.generate`: prompt_logprobs, prompt_token_ids

`prompt_logprobs` is a list with an element for each token of the prompt: null for the first, then
{token id: {logprob, rank, decoded_token}} of the top k and of the token itself, whatever its rank.
So element i + 1 is the row of offset start + i. vLLM writes −9999 for a probability of 0.

Two passes, as answers come in any order: where each document's lie, then shard by shard their rows.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows
from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.admin.recode import cut_rows
from megatron_pd.store.codecs import Codec
from megatron_pd.teacher.dump import shards_of

__all__ = ["from_vllm"]

_FLUSH_ROWS = 1 << 16
_IMPOSSIBLE = -9999.0
_HEAD = re.compile(rb'\{"document": ?(\d+), ?"start": ?(\d+), ?"')


class _Place(NamedTuple):
    """What an answer is about, and where it lies: the number of its line, from 1, and its first
    byte."""

    document: int
    start: int
    line: int
    position: int
    file: Path

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class _Answer(NamedTuple):
    model: Any
    top_k: Any
    token_ids: list[int] | None
    logprobs: list[Any]


def from_vllm(
    files: Sequence[Path],
    path: Path,
    corpus: MegatronCorpus,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    codec: str | type[Codec] = "compact",
    value_bits: int = 10,
    workers: int = 1,
    progress: Progress = lambda tokens: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> LogitStore:
    """Writes the store of these answers, or what is missing of it.

    Where several answers have a token's row, that of the one which begins first counts.

    Args:
        tokenizer: `tokenizer_fingerprint` of the corpus's, for the manifest.
        top_p, top_k: keep the top-p of a row, then the top-k of that; None: all that was asked for.
        progress: is told tokens.
        note: is told how many tokens have no answer.
    Raises:
        UserError: a line that is no answer, or of another corpus, model or k, with file and line.
        StoreError: the store there was begun with others; what `LogitStoreWriter` refuses.
    """
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it is a probability mass, in (0, 1].")
    lengths = corpus.document_lengths
    places = _Places(files, workers)
    if (last := places[-1]).document >= len(lengths):
        raise UserError(
            f"{last}: document {last.document}; {corpus.prefix} has {len(lengths):,} documents."
        )
    first = _answer(places[0])
    asked = _top_k_of(first, places[0], top_k)
    metadata: dict[str, Any] = {
        "teacher": first.model or "a model of vLLM",
        "source": "prompt_logprobs of vLLM",
        "top_p": top_p,
        "top_k": min(asked, top_k or asked),
    }
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer

    def write(documents: range, report: Progress) -> int:
        missing = 0
        with LogitStoreWriter(
            path,
            vocab_size=vocab_size,
            document_lengths=lengths,
            metadata=metadata,
            codec=codec,
            value_bits=value_bits,
            statistics=("label_logprob",),
            corpus=corpus,
            documents=documents,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            for document in documents:
                length, written = int(lengths[document]), writer.written(document)
                for place in places.of(document) if written < length else ():
                    answer = _answer(place)
                    _check_same(place, answer, first, asked, top_k)
                    rows = _rows(place, answer, corpus, asked)
                    if place.start + len(rows) > written:
                        missing += max(place.start - written, 0)
                        written = _append_empty(writer, document, written, place.start)
                        new = cut_rows(rows[written - place.start :], top_p, top_k)
                        writer.append(document, written, new)
                        written += len(new)
                missing += max(length - 1 - written, 0)
                _append_empty(writer, document, written, length)
                report(length)
        return missing

    missing = sum(n for _, n in run_jobs(write, shards_of(lengths), workers, progress))
    if missing:
        note(f"{missing:,} tokens are in no answer, so they have no teacher.")
    return LogitStore(path)


def _append_empty(writer: LogitStoreWriter, document: int, begin: int, end: int) -> int:
    """Rows without a teacher up to `end`; returns where the document stands."""
    if begin < end:
        writer.append(document, begin, TeacherRows.empty(end - begin))
    return max(begin, end)


class _Places:
    """Those of all answers, by document and start; 40 bytes each.

    Raises:
        UserError: there is none, or a line doesn't tell its document.
    """

    def __init__(self, files: Sequence[Path], workers: int) -> None:
        self._files = list(files)
        parts = []
        for file, found in run_jobs(_places_in, self._files, workers):
            number = self._files.index(file)
            parts.append(np.insert(found, found.shape[1], number, axis=1))
        rows = np.concatenate(parts)
        if not len(rows):
            raise UserError(f"{', '.join(map(str, files))}: no answer is there.")
        self._rows = rows[np.lexsort((rows[:, 3], rows[:, 4], rows[:, 1], rows[:, 0]))]

    def __getitem__(self, number: int) -> _Place:
        document, start, line, position, file = self._rows[number].tolist()
        return _Place(document, start, line, position, self._files[file])

    def of(self, document: int) -> Iterator[_Place]:
        """Those of one document, by start."""
        for number in range(*np.searchsorted(self._rows[:, 0], [document, document + 1])):
            yield self[number]


def _places_in(file: Path, report: Progress) -> np.ndarray:
    """int64 [lines, 4]: document, start, line, position."""
    found = array("q")
    with open(file, "rb") as lines:
        position = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                document, start = _subject(_Place(0, 0, number, position, file), line)
                found.extend((document, start, number, position))
            position += len(line)
    return np.array(found, np.int64).reshape(-1, 4)


def _subject(place: _Place, line: bytes) -> tuple[int, int]:
    """(document, start) of an answer."""
    document: Any
    start: Any
    if head := _HEAD.match(line):  # as ask_vllm.py writes it: nothing else has to be parsed
        document, start = map(int, head.groups())
    else:
        fields = _fields(place, line)
        document, start = fields.get("document"), fields.get("start", 0)
    for name, value in (("document", document), ("start", start)):
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise UserError(
                f'{place}: "{name}" is {value!r}. An answer tells the number of its document, and '
                "the offset in it at which its prompt starts."
            )
    return document, start


def _fields(place: _Place, line: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not JSON ({error}). Where the asking was killed, ask_vllm.py with the same "
            "--output drops a line that was cut short, and asks again."
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{place}: a JSON object was expected.")
    return fields


def _answer(place: _Place) -> _Answer:
    with open(place.file, "rb") as lines:
        lines.seek(place.position)
        fields = _fields(place, lines.readline())
    try:
        response = fields.get("response", fields)
        choices = response.get("choices", [response])
        if len(choices) != 1:
            raise UserError(f"{place}: {len(choices)} choices; ask for one prompt at a time.")
        result = choices[0]
        token_ids, logprobs = result.get("prompt_token_ids"), result.get("prompt_logprobs")
        model, top_k = response.get("model"), fields.get("top_k")
    except (AttributeError, TypeError) as error:
        raise UserError(f"{place}: no answer of vLLM ({error}).") from None
    if not isinstance(logprobs, list) or not isinstance(token_ids, list | None):
        raise UserError(f"{place}: no prompt_logprobs; ask with prompt_logprobs set to k.")
    return _Answer(model, top_k, token_ids, logprobs)


def _top_k_of(answer: _Answer, place: _Place, given: int | None) -> int:
    """The k that was asked for."""
    top_k = given if answer.top_k is None else answer.top_k
    if not isinstance(top_k, int) or top_k < 1:
        raise UserError(
            f'{place}: "top_k" is {top_k!r}. It tells the prompt_logprobs that was asked for; give '
            "it as --top-k where the lines don't."
        )
    return top_k


def _check_same(
    place: _Place, answer: _Answer, first: _Answer, asked: int, top_k: int | None
) -> None:
    own = _top_k_of(answer, place, top_k)
    for name, here, there in (("model", answer.model, first.model), ("top_k", own, asked)):
        if here != there:
            raise UserError(
                f"{place}: {name} is {here!r}, in the first document's answer {there!r}. A store "
                "has one teacher and one k: convert them to two stores."
            )


def _rows(place: _Place, answer: _Answer, corpus: MegatronCorpus, top_k: int) -> TeacherRows:
    """The rows of the prompt's tokens but the last, at most k entries each."""
    document, start, count = place.document, place.start, len(answer.logprobs)
    length = int(corpus.document_lengths[document])
    if start + count > length:
        raise UserError(
            f"{place}: a prompt of {count:,} tokens from offset {start:,} on, but document "
            f"{document} has {length:,} tokens. Give the corpus that was asked about."
        )
    tokens = corpus.tokens(document, start, count)
    if answer.token_ids is not None:
        pairs = enumerate(itertools.zip_longest(answer.token_ids, tokens.tolist()))
        if (differ := next((i for i, (here, there) in pairs if here != there), None)) is not None:
            raise UserError(
                f"{place}: document {document}, offset {start + differ}: the prompt has other "
                f"tokens than {corpus.prefix}. Give the corpus that was asked about."
            )
    labels = tokens[1:].astype(np.int64)
    ids, logprobs, ranks = _entries(place, answer.logprobs[1:])
    is_label = ids == labels[:, None]
    found = is_label.any(axis=1)
    enough = (ids >= 0).sum(axis=1) >= top_k
    label_logprob = np.where(is_label, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    for wrong, reason in (
        (~found, "the token that follows is not in its prompt_logprobs; is it another corpus?"),
        (~enough, f"fewer than the {top_k} entries that were asked for."),
        (~(logprobs <= 0).all(axis=1), "a log-probability is above 0, or not a number."),
        (
            label_logprob <= _IMPOSSIBLE,
            "the token that follows has probability 0: were the probabilities processed? vLLM "
            "must run with --logprobs-mode raw_logprobs, its default.",
        ),
    ):
        if wrong.any():
            offset = start + int(wrong.argmax())
            raise UserError(f"{place}: document {document}, offset {offset}: {reason}")
    order = np.lexsort((ranks, -logprobs), axis=1)[:, :top_k]
    ids, logprobs = (np.take_along_axis(values, order, axis=1) for values in (ids, logprobs))
    counts = (logprobs > _IMPOSSIBLE).sum(axis=1).astype(np.int32)
    beyond = np.arange(order.shape[1]) >= counts[:, None]
    return TeacherRows(
        np.where(beyond, -1, ids).astype(np.int32),
        np.where(beyond, 0.0, logprobs).astype(np.float32),
        counts,
        {"label_logprob": label_logprob.astype(np.float32)},
    )


def _entries(place: _Place, positions: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids (int64), logprobs and ranks, [positions, entries]; −1, −inf and inf where a position
    has fewer."""
    try:
        width = max((len(entries) for entries in positions), default=0)
        ids = np.full((len(positions), width), -1, np.int64)
        logprobs = np.full(ids.shape, -np.inf)
        ranks = np.full(ids.shape, np.inf)
        for row, entries in enumerate(positions):
            values = entries.values()
            ids[row, : len(entries)] = [int(token) for token in entries]
            logprobs[row, : len(entries)] = [value["logprob"] for value in values]
            ranks[row, : len(entries)] = [value.get("rank") or np.inf for value in values]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{place}: its prompt_logprobs are not as vLLM writes them ({error})."
        ) from None
    return ids, logprobs, ranks

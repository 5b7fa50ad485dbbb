"""Stores to Parquet files and back, for everyone who does not read the store's own format.

A row per token, by document and offset:

    document  int64           offset    int64
    ids       list<int32>     logprobs  list<float32>   both by falling log-probability
    label_logprob, entropy, std  float32, where the store has them (null: unknown)

A token without a teacher has empty lists. The schema's metadata has, under the key `megatron-pd`,
JSON: vocab_size, draws (0, or of the kind `sampled`), documents (of the whole store),
first_document and stop_document (of this file), statistics (of its rows), store_id, and the
store's metadata, which tells the teacher and how it was dumped. Under `megatron-pd.token-digests`,
where the store is bound to its corpus: a digest of the tokens of each of the file's documents
(uint64 as little-endian bytes, in base64; 0 for an empty document).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pd.store.admin.merge import plan_copies, whole
from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.admin.scan import scan_documents
from megatron_pd.store.codecs import Codec
from megatron_pd.store.format import corpus_digests
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import STATISTICS, Corpus, StoreError, TeacherRows
from megatron_pd.store.writer import LogitStoreWriter

__all__ = ["from_parquet", "to_parquet"]

_METADATA_KEY = b"megatron-pd"
_DIGESTS_KEY = b"megatron-pd.token-digests"
_FILE_ROWS = 1 << 24
_GROUP_ROWS = 1 << 16
_BATCH_ROWS = 1 << 13
_FLUSH_ROWS = 1 << 17


def to_parquet(
    store: LogitStore,
    folder: Path,
    *,
    file_rows: int = _FILE_ROWS,
    workers: int = 1,
    progress: Progress = lambda rows: None,
) -> list[Path]:
    """Writes a file per run of documents of about `file_rows` rows; returns the files.

    A file gets its name once it is whole, and is then not written again by a later call.

    Raises:
        StoreError: pyarrow is missing, or the folder holds files of another store.
    """
    pa, pq = _pyarrow()
    folder.mkdir(parents=True, exist_ok=True)
    lengths = store.document_lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    statistics = [(name, pa.float32()) for name in store.statistics]
    schema = pa.schema(
        [
            ("document", pa.int64()),
            ("offset", pa.int64()),
            ("ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            *statistics,
        ]
    )

    def write(documents: range, report: Progress) -> Path:
        described, digests = _description(store, documents), store.token_digests(documents)
        path = folder / f"{documents.start:012d}-{documents.stop:012d}.parquet"
        if path.exists():
            there = _open(path)
            if there.metadata != described or not _same(there.digests, digests):
                raise StoreError(
                    f"{path} is in the way: it was not made from {store.path}, or by another "
                    "release of megatron_pd. Delete it, or choose another folder."
                )
            report(int(starts[documents.stop] - starts[documents.start]))
            return path
        scratch = path.with_suffix(".partial")
        metadata = {_METADATA_KEY: json.dumps(described).encode()}
        if digests is not None:
            metadata[_DIGESTS_KEY] = base64.b64encode(digests.astype("<u8").tobytes())
        full_schema = schema.with_metadata(metadata)
        with pq.ParquetWriter(scratch, full_schema, compression="zstd") as writer:
            for table in _tables(store, documents, starts, full_schema):
                writer.write_table(table)
                report(len(table))
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        scratch.rename(path)
        return path

    jobs = plan_copies(whole(store), lengths, file_rows)
    return sorted(path for _, path in run_jobs(write, jobs, workers, progress))


def from_parquet(
    files: Sequence[Path],
    path: Path,
    *,
    vocab_size: int | None = None,
    corpus: Corpus | None = None,
    metadata: Mapping[str, Any] | None = None,
    codec: str | type[Codec] = "compact",
    value_bits: int = 10,
    workers: int = 1,
    progress: Progress = lambda rows: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> LogitStore:
    """Writes the store of Parquet files, or what is missing of it: a shard per file.

    The rows of a file come by document and offset, and no two files share a document. Entries of a
    row may come in any order.

    Args:
        vocab_size, metadata: of files that `to_parquet` did not write.
        corpus: compared with the files' digests of its tokens; binds the store, and says how long
            documents are whose rows are not all in the files. Only files of `to_parquet`, which
            hold all rows, can do without: the store is then bound by their digests.
        progress: is told rows.
        note: is told what could not be compared.
    Raises:
        StoreError: pyarrow is missing; files that can't be read, don't fit together, or are of
            another corpus.
    """
    sources = [_open(file) for file in _files(files)]
    described = [source.metadata for source in sources if source.metadata is not None]
    own = len(described) == len(sources)
    draws = 0
    if own:
        for source, its in zip(sources, described, strict=True):
            for name in ("store_id", "vocab_size", "draws", "documents"):
                if its[name] != described[0][name]:
                    raise StoreError(
                        f"{source.path} and {sources[0].path} come from different stores: {name} "
                        f"is {its[name]} and {described[0][name]}."
                    )
        vocab_size, draws = described[0]["vocab_size"], described[0]["draws"]
        metadata = described[0]["metadata"]
    if vocab_size is None:
        raise StoreError(f"{sources[0].path} does not tell its vocabulary: give --vocab-size.")
    if corpus is None and not own:
        raise StoreError(
            f"{sources[0].path} was not written by `convert to-parquet`, so its last rows may not "
            "be documents' last tokens: give --corpus."
        )
    sources.sort(key=lambda source: source.documents.start)
    lengths = _lengths(sources, described[0]["documents"]) if own else None
    if corpus is not None:
        if lengths is not None:
            _check_lengths(sources[0].path, lengths, corpus)
        lengths = corpus.document_lengths
    assert lengths is not None
    for sentence in _not_compared(sources, corpus is not None):
        note(sentence)
    shards = _shards(sources, len(lengths), own)

    def write(job: tuple[int, range], report: Progress) -> None:
        source, documents = sources[job[0]], job[1]
        digests = source.digests
        if corpus is not None:
            digests = corpus_digests(corpus, documents)
            source.check_digests(digests, documents)
        with LogitStoreWriter(
            path,
            vocab_size=vocab_size,
            document_lengths=lengths,
            metadata=metadata or {},
            codec=codec,
            value_bits=value_bits,
            statistics=source.statistics,
            token_digests=digests,
            documents=documents,
            kind="sampled" if draws else "top",
            draws=draws,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            filler = _Filler(writer, documents, lengths, source)
            for documents_of_rows, offsets, rows in source.rows():
                filler.add(documents_of_rows, offsets, rows)
                report(len(rows))
            filler.finish()

    for _ in run_jobs(write, list(enumerate(shards)), workers, progress):
        pass
    return LogitStore(path)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise StoreError(
            "Parquet needs pyarrow, which is not installed: pip install 'megatron-pd[parquet]'."
        ) from None
    return pyarrow, pyarrow.parquet


def _description(store: LogitStore, documents: range) -> dict[str, Any]:
    return {
        "version": 1,
        "vocab_size": store.vocab_size,
        "draws": store.draws,
        "documents": store.num_documents,
        "first_document": documents.start,
        "stop_document": documents.stop,
        "statistics": list(store.statistics_of(documents)),
        "store_id": f"{store.store_id:016x}",
        "metadata": store.metadata,
    }


def _tables(store: LogitStore, documents: range, starts: np.ndarray, schema: Any) -> Iterator[Any]:
    """The documents' rows in tables of about `_GROUP_ROWS`; `starts`: rows before each document."""
    parts: list[tuple[int, TeacherRows]] = []
    held = 0
    for document, offset, rows in scan_documents(store, np.arange(documents.start, documents.stop)):
        parts.append((int(starts[document]) + offset, rows))
        held += len(rows)
        if held >= _GROUP_ROWS:
            yield _table(parts, starts, schema)
            parts, held = [], 0
    if parts:
        yield _table(parts, starts, schema)


def _table(parts: list[tuple[int, TeacherRows]], starts: np.ndarray, schema: Any) -> Any:
    """Of rows, each part with its first one's number in the store; `starts`: of the documents."""
    pa, _ = _pyarrow()
    rows = TeacherRows.concatenate([rows for _, rows in parts])
    numbers = np.concatenate([np.arange(first, first + len(part)) for first, part in parts])
    documents = np.searchsorted(starts, numbers, "right") - 1
    mask = np.arange(rows.ids.shape[1]) < rows.counts[:, None]
    ends = np.concatenate([[0], np.cumsum(rows.counts)]).astype(np.int32)
    arrays = [
        documents,
        numbers - starts[documents],
        pa.ListArray.from_arrays(ends, rows.ids[mask]),
        pa.ListArray.from_arrays(ends, rows.logprobs[mask]),
    ]
    for name in schema.names[4:]:
        values = rows.statistics.get(name, np.full(len(rows), np.nan, np.float32))
        arrays.append(pa.array(values, mask=np.isnan(values)))
    return pa.Table.from_arrays([pa.array(array) for array in arrays], schema=schema)


def _files(paths: Sequence[Path]) -> list[Path]:
    """Files, and those in folders."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])
    ]
    if not files:
        raise StoreError(f"{', '.join(map(str, paths))}: no .parquet file there.")
    return files


@dataclass
class _ParquetFile:
    """A file of rows; `documents` are those it speaks of, `digests` uint64 of their tokens, where
    `to_parquet` wrote them."""

    path: Path
    file: Any
    metadata: dict[str, Any] | None
    digests: np.ndarray | None

    def __post_init__(self) -> None:
        names = self.file.schema_arrow.names
        for name in ("document", "offset", "ids", "logprobs"):
            if name not in names:
                raise StoreError(f"{self.path}: no column {name!r}; it has {names}.")
        self.statistics = [name for name in STATISTICS if name in names]
        if self.metadata is not None:
            self.statistics = self.metadata.get("statistics", self.statistics)
        if self.metadata is not None:
            self.documents = range(self.metadata["first_document"], self.metadata["stop_document"])
            if self.digests is not None and len(self.digests) != len(self.documents):
                raise StoreError(
                    f"{self.path}: {len(self.digests)} digests of tokens for "
                    f"{len(self.documents)} documents. Export the file again: convert to-parquet."
                )
            return
        self.digests = None
        first, last = -1, -1
        for batch in self._batches(["document"]):
            documents = batch.column("document").to_numpy()
            if len(documents):
                first = int(documents[0]) if first < 0 else first
                last = int(documents[-1])
        self.documents = range(first, last + 1)

    def check_digests(self, corpus_digests: np.ndarray, documents: range) -> None:
        """StoreError unless the file's documents have these digests (uint64, of `documents`, among
        which the file's are)."""
        if self.digests is None:
            return
        first = self.documents.start - documents.start
        there = corpus_digests[first : first + len(self.documents)]
        differ = (there != self.digests) & (there != 0)  # stores had other digests of no tokens
        if differ.any():
            raise StoreError(
                f"{self.path}: document {self.documents.start + int(differ.argmax())} has other "
                "tokens in --corpus than in the corpus that the teacher read. Give that corpus, "
                "or dump this one."
            )

    def lengths(self) -> np.ndarray:
        """Rows of each of its documents."""
        lengths = np.zeros(len(self.documents), np.int64)
        for batch in self._batches(["document"]):
            documents, rows = np.unique(batch.column("document").to_numpy(), return_counts=True)
            index = documents - self.documents.start
            if len(other := documents[(index < 0) | (index >= len(lengths))]):
                raise StoreError(
                    f"{self.path}: has rows of document {other[0]}, but says that it holds "
                    f"{self.documents.start} to {self.documents.stop - 1}. Export it again: "
                    "convert to-parquet."
                )
            lengths[index] += rows
        return lengths

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, TeacherRows]]:
        """The document and the offset (int64 [n] each) of n rows, and the rows, in the file's
        order."""
        for batch in self._batches(["document", "offset", "ids", "logprobs", *self.statistics]):
            if len(batch):
                documents, offsets = (batch.column(x).to_numpy() for x in ("document", "offset"))
                yield documents, offsets, self._rows(batch)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        pa, _ = _pyarrow()
        try:
            yield from self.file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.path}: cannot be read: {error}.") from None

    def _rows(self, batch: Any) -> TeacherRows:
        import pyarrow.compute as pc

        lists = [batch.column(name) for name in ("ids", "logprobs")]
        counts, others = (
            pc.list_value_length(column)
            .fill_null(0)
            .to_numpy(zero_copy_only=False)
            .astype(np.int32)
            for column in lists
        )
        if (counts != others).any():
            row = int(np.flatnonzero(counts != others)[0])
            raise StoreError(
                f"{self.path}: document {batch.column('document')[row]}, offset "
                f"{batch.column('offset')[row]} has {counts[row]} ids and {others[row]} logprobs."
            )
        rows = TeacherRows.empty(len(counts), int(counts.max(initial=0)))
        mask = np.arange(rows.ids.shape[1]) < counts[:, None]
        rows.ids[mask] = pc.list_flatten(lists[0]).to_numpy(zero_copy_only=False)
        rows.logprobs[mask] = pc.list_flatten(lists[1]).to_numpy(zero_copy_only=False)
        statistics = {
            name: batch.column(name).to_numpy(zero_copy_only=False).astype(np.float32)
            for name in self.statistics
        }
        return _sorted(TeacherRows(rows.ids, rows.logprobs, counts, statistics), mask)


def _open(path: Path) -> _ParquetFile:
    pa, pq = _pyarrow()
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.metadata or {}
        metadata, digests = found.get(_METADATA_KEY), found.get(_DIGESTS_KEY)
        return _ParquetFile(
            path,
            file,
            None if metadata is None else json.loads(metadata),
            None if digests is None else np.frombuffer(base64.b64decode(digests), "<u8"),
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: not a Parquet file that can be read: {error}.") from None


def _sorted(rows: TeacherRows, mask: np.ndarray) -> TeacherRows:
    """The rows by falling log-probability, ties as they come."""
    if not (np.diff(rows.logprobs, axis=1)[mask[:, 1:]] > 0).any():
        return rows
    order = np.argsort(np.where(mask, -rows.logprobs, np.inf), axis=1, kind="stable")
    ids, logprobs = (np.take_along_axis(a, order, axis=1) for a in (rows.ids, rows.logprobs))
    return TeacherRows(ids, logprobs, rows.counts, rows.statistics)


def _lengths(sources: list[_ParquetFile], documents: int) -> np.ndarray:
    lengths = np.zeros(documents, np.int64)
    for source in sources:
        lengths[source.documents.start : source.documents.stop] += source.lengths()
    return lengths


def _check_lengths(path: Path, lengths: np.ndarray, corpus: Corpus) -> None:
    """StoreError unless the files' documents are as long as those of the corpus."""
    there = corpus.document_lengths
    if len(lengths) != len(there):
        raise StoreError(
            f"{path}: of a store of {len(lengths)} documents, --corpus has {len(there)}. Give the "
            "corpus that the teacher read."
        )
    if (differ := lengths != there).any():
        document = int(differ.argmax())
        raise StoreError(
            f"{path} and its like: document {document} has {lengths[document]} rows, in --corpus "
            f"{there[document]} tokens. Give the corpus that the teacher read."
        )


def _not_compared(sources: list[_ParquetFile], with_corpus: bool) -> list[str]:
    """A sentence where some files have no digests."""
    lacking = [source for source in sources if source.digests is None]
    if not lacking:
        return []
    files = f"{lacking[0].path}" + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
    without = f"{files} without digests of the corpus's tokens"
    if with_corpus:
        return [f"{without}: nothing tells whether --corpus is the one that the teacher read."]
    return [f"{without}: the store of them is bound to no corpus. --corpus binds it."]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b is None or (a is not None and b is not None and np.array_equal(a, b))


def _shards(sources: list[_ParquetFile], documents: int, complete: bool) -> list[range]:
    """The documents that each file's shard holds: its own, and those after it in no file."""
    ends = [0, *(source.documents.stop for source in sources)]
    starts = [*(source.documents.start for source in sources), documents]
    for source, end in zip(sources, ends, strict=False):
        if source.documents.start < end:
            raise StoreError(
                f"{source.path}: document {source.documents.start} is in another file too, or out "
                "of order. A document's rows come in one file, which is sorted by document."
            )
    if starts[-1] < ends[-1]:
        raise StoreError(
            f"{sources[-1].path}: has document {ends[-1] - 1}, the corpus only {documents}."
        )
    for end, start in zip(ends, starts, strict=True):
        if complete and start > end:
            raise StoreError(f"Documents {end} to {start - 1} are in none of the files.")
    edges = [0, *starts[1:]]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


class _Filler:
    """Appends a file's rows, and empty ones where it has none. What an earlier call wrote is passed
    over."""

    def __init__(
        self, writer: LogitStoreWriter, documents: range, lengths: np.ndarray, source: _ParquetFile
    ) -> None:
        self._writer, self._documents, self._source = writer, documents, source
        self._lengths = lengths[documents.start : documents.stop]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._last = (documents.start, -1)  # of the file's rows so far: document, offset
        self._next = 0  # row of the shard

    def add(self, documents: np.ndarray, offsets: np.ndarray, rows: TeacherRows) -> None:
        """Rows by document and offset, int64 [rows] each, at least one."""
        self._check_order(documents, offsets)
        index = documents - self._documents.start
        beyond = np.flatnonzero((offsets < 0) | (offsets >= self._lengths[index]))
        if len(beyond):
            document, offset = documents[beyond[0]], offsets[beyond[0]]
            raise StoreError(
                f"{self._source.path}: a row of document {document}, offset {offset}, but that "
                f"document has {self._lengths[index[beyond[0]]]} tokens. Is this another corpus?"
            )
        self._last = (int(documents[-1]), int(offsets[-1]))
        numbers = self._starts[index] + offsets
        self._fill_up(int(numbers[-1]) + 1, numbers, rows)

    def finish(self) -> None:
        """Fills up to the shard's end."""
        self._fill_up(int(self._starts[-1]), np.zeros(0, np.int64), TeacherRows.empty(0))

    def _check_order(self, documents: np.ndarray, offsets: np.ndarray) -> None:
        before, offsets_before = (
            np.append(last, values[:-1])
            for last, values in zip(self._last, (documents, offsets), strict=True)
        )
        unordered = (documents < before) | ((documents == before) & (offsets <= offsets_before))
        outside = (documents < self._documents.start) | (documents >= self._documents.stop)
        if len(wrong := np.flatnonzero(unordered | outside)):
            row = wrong[0]
            raise StoreError(
                f"{self._source.path}: document {documents[row]}, offset {offsets[row]} comes "
                f"after document {before[row]}, offset {offsets_before[row]}. Sort the rows by "
                "document and offset, and number documents as the corpus does."
            )

    def _fill_up(self, stop: int, numbers: np.ndarray, rows: TeacherRows) -> None:
        """The shard's rows up to `stop`, among them those with these numbers."""
        for begin in range(self._next, stop, _BATCH_ROWS):
            end = min(begin + _BATCH_ROWS, stop)
            which = slice(*np.searchsorted(numbers, [begin, end]))
            part = rows[which]
            if len(part) < end - begin:
                part = TeacherRows.empty(end - begin, rows.ids.shape[1], rows.statistics)
                part.put(numbers[which] - begin, rows[which])
            document, offset = self._position(begin)
            self._writer.append_run(document, offset, part)
        self._next = stop

    def _position(self, row: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._documents[index], row - int(self._starts[index])

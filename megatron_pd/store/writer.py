"""Writes one shard of a logit store; safe against being killed at any instant.

Rows wait in `PendingRows`, are coded, and go to the file through `ShardAppender`, which begins with
what `recovery` finds of an earlier writer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from megatron_pd.errors import UserError
from megatron_pd.store import _logit_codec
from megatron_pd.store.appender import ShardAppender
from megatron_pd.store.blocks import CodedBlock, EntropyModel
from megatron_pd.store.codecs import Codec, codec_named
from megatron_pd.store.codecs.in_store import by_number, manifest_entries
from megatron_pd.store.document_rows import DocumentRows
from megatron_pd.store.files import AppendFile, fsync_directory, publish_once, write_error
from megatron_pd.store.format import (
    MANIFEST_NAME,
    MAX_VOCAB_SIZE,
    PARTIAL_SUFFIX,
    FrameHeader,
    Manifest,
    ShardHeader,
    parse_shard_name,
    shard_name,
    token_digest,
)
from megatron_pd.store.identity import check_digests, check_manifest, check_statistics
from megatron_pd.store.pending import PendingRows
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.shard import Shard
from megatron_pd.store.types import (
    STATISTICS,
    Corpus,
    Layout,
    StoreError,
    TeacherRows,
    statistics_in,
    statistics_mask,
)

__all__ = ["LogitStoreWriter"]

# A read decodes a block from its start, on average half a block more than it asks for, which counts
# for short sequences; half as many rows a block would cost almost 1% more bytes.
BLOCK_ROWS = 256
BUFFER_BYTES = 16 << 20
_COMPARED_DOCUMENTS = 1 << 12
Kind = Literal["top", "sampled"]


class LogitStoreWriter:
    """Writes the rows of a contiguous range of documents into the store directory `path`.

    Every rank of a dump opens its own writer with the same `vocab_size`, `document_lengths` (int64
    [D], of the whole corpus), `metadata` (JSON-able: teacher, tokenizer hash, top_p, ...) and its
    own `documents` (default: all); ranks need not talk to each other.

    Documents come in any order, the rows of a document in order and in pieces of any size.  The
    last row of a document has no next token and must be empty.  `flush()` makes everything appended
    durable; after a crash the next writer of the same shard goes on from `written(document)`.
    Leaving the `with` block finishes the shard; leaving it by an exception keeps what was flushed
    and whatever of the rest reached the file.  A writer whose write failed or was interrupted can
    only be left; the next one goes on.  It holds some 100 MB beside 32 bytes per document.

    codec       "compact" (default), "exact" (float32 log-probabilities), a codec of your own as
                `package.module:attribute`, or the subclass of `Codec` itself.
    value_bits  resolution of `compact`: 10 bits cost about 2e-6 nats per entry of a row, at most
                three times that; each further bit leaves a quarter of it and takes about a bit per
                entry.
    statistics  those of `STATISTICS` that every row of the shard has, though a row without entries
                needn't bring them.
    codecs      all codecs of the store, where `append_block` brings blocks of several.
    flush_rows  flush by itself whenever so many rows were appended since the last time; None: only
                when it is called.
    corpus      binds the shard to the corpus by a hash of every document's tokens.
    token_digests  uint64 [documents of the shard]: these hashes themselves, in place of the corpus
                (copies of a store have `LogitStore.token_digests`).
    kind        "top", or "sampled" with `draws` (draws of every non-empty row).

    Raises StoreError for arguments out of range, a codec that can't be found, another dump's files
    in the way, and what a disk refuses.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_size: int,
        document_lengths: np.ndarray,
        metadata: Mapping[str, Any],
        codec: str | type[Codec] = "compact",
        value_bits: int = 10,
        statistics: Sequence[str] = (),
        codecs: Sequence[type[Codec]] | None = None,
        flush_rows: int | None = None,
        corpus: Corpus | None = None,
        token_digests: np.ndarray | None = None,
        documents: range | None = None,
        kind: Kind = "top",
        draws: int = 0,
    ) -> None:
        lengths = np.asarray(document_lengths, np.int64)
        layout = Layout(vocab_size, draws, value_bits)
        _check_arguments(path, layout, lengths, kind)
        if unknown := sorted(set(statistics) - set(STATISTICS)):
            raise StoreError(f"{path}: unknown statistics {unknown}; known: {STATISTICS}.")
        self.path = Path(path)
        self.documents = _checked_range(documents, len(lengths))
        self._layout = layout
        self._codec = _codec(path, codec)
        self._corpus = corpus
        self._digests_from = corpus if token_digests is None else np.asarray(token_digests)
        self._bound = self._digests_from is not None
        self._flush_rows, self._unflushed_rows = flush_rows, 0
        self._rows = DocumentRows(lengths[self.documents.start : self.documents.stop])
        if token_digests is not None:
            self._rows.digests[:] = token_digests
        self._pending = PendingRows()
        self._statistics = statistics_in(statistics_mask(statistics))
        self._copies_blocks = codecs is not None
        self._trainer = self._codec.trainer(layout)
        self._model: EntropyModel | None = None
        self._coder: Codec | None = None
        self._failed = False
        self._final = self.path / shard_name(self.documents)
        entries = manifest_entries([self._codec] if codecs is None else codecs)
        self._manifest = Manifest.of(vocab_size, lengths, draws, metadata, entries)
        self._shard = self._open()

    def append(self, document: int, offset: int, rows: TeacherRows) -> None:
        """Adds rows `offset`, `offset + 1`, ... of a document."""
        index = self._checked_position(document, offset, len(rows))
        self._append(int(self._rows.starts[index]) + offset, rows)

    def append_run(self, document: int, offset: int, rows: TeacherRows) -> int:
        """As `append`, of rows that go on into the documents after it: many short documents cost
        no more than a few long ones. What is there already is passed over.

        Returns:
            how many rows were not there.
        """
        index = self._checked_document(document)
        self._check_usable()
        row = int(self._rows.starts[index]) + offset
        within = offset == 0 or 0 < offset < self._rows.length(index)
        lacking = self._rows.lacking(row, row + len(rows)) if within else None
        if lacking is None:
            raise StoreError(
                f"{self._final}: rows from document {document}, offset {offset} on were appended "
                "out of turn."
            )
        if len(lacking):
            self._check_unfinished()
        for begin, end in lacking.tolist():
            self._append(begin, rows[begin - row : end - row])
        return int((lacking[:, 1] - lacking[:, 0]).sum())

    def _append(self, row: int, rows: TeacherRows) -> None:
        end = row + len(rows)
        rows = self._with_statistics(row, rows)
        layout = self._layout
        ragged = RaggedRows.of(rows, layout.vocab_size, layout.draws, lambda i: self._at(row + i))
        last = self._rows.last_in(row, end)
        if (wrong := last[rows.counts[last] > 0]).size:
            raise StoreError(
                f"{self._at(row + int(wrong[0]))}: the document's last row has "
                f"{rows.counts[wrong[0]]} entries, but no token follows the last one. Rows are "
                "probably shifted by one: row j holds the distribution of token j + 1."
            )
        if self._corpus is not None:
            for index in self._rows.begun_in(row, end).tolist():
                self._rows.digests[index] = self._token_digest(self.documents.start + index)
        if len(rows):
            self._pending.add(row, ragged)
            self._rows.add(row, end)
        if self._pending.nbytes >= BUFFER_BYTES:
            self._write_pending()
        self._flush_if_due(len(rows))

    def _at(self, row: int) -> str:
        """Where a row of the shard belongs, for messages."""
        document, offset = self._rows.position(row)
        return f"{self.path}, document {self.documents.start + document}, offset {offset}"

    def append_block(self, row: int, block: CodedBlock) -> None:
        """Adds a block of another shard as it is coded; `row`, counted from the shard's first, is
        its first row and must be the next of its document. `value_bits` must be that shard's."""
        self._check_usable()
        if self._shard is None or not self._rows.is_next(row):
            raise StoreError(f"{self._final}: row {row} was appended out of turn.")
        if (heavy := block.too_heavy(self._layout)) is not None:
            raise StoreError(
                f"{self._at(row + heavy)}: the source's row has a mass of more than 1, so it is no "
                "distribution. Log-probabilities are natural logarithms: make the source anew."
            )
        with self._failing_for_good():
            self._shard.add_block(row, block)
        self._rows.add(row, row + block.rows)
        self._flush_if_due(block.rows)

    def flush(self) -> None:
        """Returns once everything appended before is durable."""
        self._check_usable()
        if self._shard is not None:
            self._write_pending()
            with self._failing_for_good():
                self._shard.sync()
        self._rows.durable[:] = self._rows.appended
        self._unflushed_rows = 0

    @property
    def written_rows(self) -> np.ndarray:
        """`written` of every document of the shard: int64 [documents]."""
        return self._rows.durable.copy()

    def written(self, document: int) -> int:
        """Rows of a document that are durable: a restarted dump goes on at this offset."""
        return int(self._rows.durable[self._checked_document(document)])

    def close(self) -> None:
        """Finishes the shard: checks that no row is missing, then publishes it."""
        self._check_usable()
        if self._shard is None:
            return
        try:
            self._write_pending()
            self._check_complete()
            self._shard.finish(self._final)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leaves the shard unfinished; the next writer goes on after the last whole block."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def __enter__(self) -> LogitStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _open(self) -> ShardAppender | None:
        """What appends to the shard; None where it is finished already."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                fsync_directory(self.path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        manifest = _publish_manifest(self.path / MANIFEST_NAME, self._manifest)
        if self._final.exists():
            self._check_finished(manifest)
            self._rows.durable[:] = self._rows.appended[:] = np.diff(self._rows.starts)
            return None
        self._check_overlap()
        header = ShardHeader(
            manifest.store_id,
            self.documents.start,
            len(self.documents),
            int(self._rows.starts[-1]),
            self._layout.vocab_size,
            self._layout.draws,
            self._layout.value_bits,
            self._bound,
        )
        file = AppendFile(self._final.with_name(self._final.name + PARTIAL_SUFFIX))
        try:
            codecs = by_number(manifest.codecs, self.path / MANIFEST_NAME)
            mask = statistics_mask(self._statistics)
            shard = ShardAppender(file, header, self._rows, codecs, mask, self._found)
            self._check_begun(file.path)
        except BaseException:
            file.close()
            raise
        self._rows.durable[:] = self._rows.appended
        return shard

    def _check_finished(self, manifest: Manifest) -> None:
        """A finished shard is of this corpus, by a sample of its documents."""
        codecs = by_number(manifest.codecs, self.path / MANIFEST_NAME)
        shard = Shard(self._final, self.documents, manifest.store_id, codecs)
        if shard.footer.blocks and not self._copies_blocks:
            check_statistics(self._final, statistics_in(shard.footer.statistics), self._statistics)
        if shard.header.bound and self._digests_from is not None:
            count = min(len(self.documents), _COMPARED_DOCUMENTS)
            documents = np.unique(
                np.linspace(self.documents.start, self.documents.stop - 1, count, dtype=np.int64)
            )
            digests = shard.token_digests(self.documents)[documents - self.documents.start]
            self._check_digests(self._final, documents, digests)

    def _check_begun(self, path: Path) -> None:
        """What an earlier writer began is of this corpus."""
        if self._digests_from is not None:
            begun = np.flatnonzero(self._rows.appended)
            self._check_digests(path, begun + self.documents.start, self._rows.digests[begun])

    def _check_digests(self, path: Path, documents: np.ndarray, digests: np.ndarray) -> None:
        there = self._digests_from
        assert there is not None
        if isinstance(there, np.ndarray):
            there = there[documents - self.documents.start]
        check_digests(path, documents, digests, there)

    def _found(self, header: FrameHeader, model: EntropyModel | None) -> None:
        """A frame of the unfinished shard that is gone on with."""
        if model is None:
            if not self._copies_blocks:
                check_statistics(self._final, statistics_in(header.statistics), self._statistics)
            if self._trainer is not None:
                self._trainer.found_rows(header.entries)
        elif self._trainer is not None and model.codec is self._codec:
            self._trainer.found_model(model.payload)
            self._model = model

    def _write_pending(self) -> None:
        """Writes the buffered rows, neighbouring documents in common blocks."""
        with self._failing_for_good():
            runs = self._pending.take()
            if not runs:
                return
            assert self._shard is not None
            coder = self._coder_for([rows for _, rows in runs])
            for row, rows in runs:
                for block in rows.blocks(BLOCK_ROWS):
                    self._shard.add_block(row, CodedBlock.of(block, coder, self._model))
                    row += len(block)

    def _coder_for(self, runs: list[RaggedRows]) -> Codec:
        """What codes these rows; a new model of them is in the file before."""
        payload = None if self._trainer is None else self._trainer.train(runs)
        if payload is not None:
            assert self._shard is not None
            self._model = EntropyModel(self._codec, payload)
            self._coder = None
            self._shard.add_model(self._model)
        if self._coder is None:
            model = self._model
            self._coder = self._codec(self._layout, None if model is None else model.payload)
        return self._coder

    def _flush_if_due(self, rows: int) -> None:
        self._unflushed_rows += rows
        if self._flush_rows is not None and self._unflushed_rows >= self._flush_rows:
            self.flush()

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """After an error or an interrupt inside, nobody knows which rows were written: only a new
        writer can tell, from the file."""
        try:
            yield
        except BaseException:
            self._failed = True
            self.abandon()
            raise

    def _check_usable(self) -> None:
        if self._failed:
            raise StoreError(
                f"{self._final}: an earlier write failed or was interrupted. Open the shard again: "
                "what was flushed is kept, and written(document) says where to go on."
            )

    def _check_unfinished(self) -> None:
        self._check_usable()
        if self._shard is None:
            raise StoreError(f"{self._final}: the shard is finished, nothing can be added to it.")

    def _check_complete(self) -> None:
        missing = self._rows.incomplete()
        if len(missing):
            index = int(missing[0])
            raise StoreError(
                f"{self._final}: {len(missing)} of {len(self.documents)} documents are not "
                f"complete, the first is document {self.documents[index]} with "
                f"{self._rows.appended[index]} of {self._rows.length(index)} rows. Append the "
                "rest; what is there is kept."
            )

    def _check_overlap(self) -> None:
        for entry in self.path.iterdir():
            other = parse_shard_name(entry.name.removesuffix(PARTIAL_SUFFIX))
            if other and other != self.documents and _overlap(other, self.documents):
                raise StoreError(
                    f"{entry}: holds documents {other.start} to {other.stop - 1}, which overlap "
                    f"this writer's {self.documents.start} to {self.documents.stop - 1}. Give "
                    "every writer its own documents, and keep the split when a dump restarts."
                )

    def _with_statistics(self, row: int, rows: TeacherRows) -> TeacherRows:
        """The rows with the shard's statistics: rows without entries get those that they lack."""
        if rows.statistics.keys() == set(self._statistics):
            return rows
        if unknown := sorted(rows.statistics.keys() - set(STATISTICS)):
            raise StoreError(f"{self._at(row)}: unknown statistics {unknown}, known: {STATISTICS}.")
        if rows.statistics.keys() - set(self._statistics) or rows.counts.any():
            raise StoreError(
                f"{self._at(row)}: rows come with statistics {tuple(rows.statistics)}, the "
                f"writer was opened with {self._statistics}. All rows of a shard have the same: "
                "say which as LogitStoreWriter(statistics=…)."
            )
        unknown_values = np.full(len(rows), np.nan, np.float32)
        statistics = {**dict.fromkeys(self._statistics, unknown_values), **rows.statistics}
        return TeacherRows(rows.ids, rows.logprobs, rows.counts, statistics)

    def _checked_document(self, document: int) -> int:
        if document not in self.documents:
            raise StoreError(
                f"{self._final.name}: document {document} is not in this shard, which holds "
                f"{self.documents.start} to {self.documents.stop - 1}."
            )
        return document - self.documents.start

    def _checked_position(self, document: int, offset: int, rows: int) -> int:
        index = self._checked_document(document)
        self._check_unfinished()
        if offset != self._rows.appended[index]:
            raise StoreError(
                f"document {document}: rows must come in order; the next one is "
                f"{self._rows.appended[index]}, but rows from {offset} were appended. "
                "Start at written(document)."
            )
        if offset + rows > self._rows.length(index):
            raise StoreError(
                f"document {document}: rows {offset} to {offset + rows - 1} appended, but it has "
                f"{self._rows.length(index)} tokens. Is this another corpus?"
            )
        return index

    def _token_digest(self, document: int) -> int:
        assert self._corpus is not None
        tokens = self._corpus.tokens(document)
        expected = self._rows.length(document - self.documents.start)
        if len(tokens) != expected:
            raise StoreError(
                f"document {document}: the corpus has {len(tokens)} tokens, document_lengths says "
                f"{expected}. Pass the lengths of this corpus."
            )
        return token_digest(tokens)


def _publish_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Creates the manifest unless it is there; returns the one that is, which must say the same."""
    if not path.exists():
        publish_once(path, manifest.to_bytes())
    found = Manifest.from_bytes(path.read_bytes(), path)
    own = Manifest.from_bytes(manifest.to_bytes(), path)  # through JSON, as the other's values went
    check_manifest(path, found, own)
    return found


def _codec(path: str | Path, codec: str | type[Codec]) -> type[Codec]:
    try:
        return codec_named(codec) if isinstance(codec, str) else codec
    except UserError as error:
        raise StoreError(f"{path}: {error}") from None


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def _checked_range(documents: range | None, total: int) -> range:
    if documents is None:
        return range(total)
    if documents.step != 1 or not 0 <= documents.start <= documents.stop <= total:
        raise StoreError(f"documents={documents}: not a contiguous part of {total} documents.")
    return documents


def _check_arguments(path: str | Path, layout: Layout, lengths: np.ndarray, kind: str) -> None:
    if not 0 < layout.vocab_size <= MAX_VOCAB_SIZE:
        raise StoreError(f"{path}: vocab_size {layout.vocab_size} is not in [1, {MAX_VOCAB_SIZE}].")
    if lengths.ndim != 1 or (lengths < 0).any():
        raise StoreError(f"{path}: document_lengths must be a 1-D array of lengths >= 0.")
    lowest, highest = _logit_codec.MIN_VALUE_BITS, _logit_codec.MAX_VALUE_BITS
    if not lowest <= layout.value_bits <= highest:
        raise StoreError(f"{path}: value_bits {layout.value_bits} is not in [{lowest}, {highest}].")
    if not 0 <= layout.draws < 1 << 16:
        raise StoreError(f"{path}: {layout.draws} draws; a row of a store has at most 65,535.")
    if (kind == "sampled") != (layout.draws > 0) or kind not in ("top", "sampled"):
        raise StoreError(
            f"{path}: kind {kind!r} with draws {layout.draws}; 'sampled' needs draws > 0, 'top' "
            "draws 0."
        )

"""A store in another codec, or with fewer entries of every row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_pd.store.admin.merge import plan_copies, whole
from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.admin.scan import scan_documents
from megatron_pd.store.codecs import Codec, CompactCodec, codec_named
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import StoreError, TeacherRows
from megatron_pd.store.writer import LogitStoreWriter

__all__ = ["cut_rows", "recode"]

_FLUSH_ROWS = 1 << 16


def recode(
    store: LogitStore,
    path: Path,
    *,
    codec: str | type[Codec] = "compact",
    value_bits: int = 10,
    top_p: float | None = None,
    top_k: int | None = None,
    shard_rows: int | None = None,
    workers: int = 1,
    progress: Progress = lambda rows: None,
) -> LogitStore:
    """Writes the rows of `store` to `path`, cut to a smaller p and k, or what is missing of them.

    The new store's metadata tells the cut and the codec.

    Args:
        shard_rows: rows of a shard, at most; None for the shards of `store`.
        progress: is told rows.
    Raises:
        StoreError: a cut out of range, or of sampled rows, which mean nothing without all draws;
            an output that is the input; damaged input.
    """
    _check_cut(store, top_p, top_k)
    if path.resolve() == store.path.resolve():
        raise StoreError(f"--output {path} is the input store; choose a different path.")
    codec = codec_named(codec) if isinstance(codec, str) else codec
    metadata = {**store.metadata, "codec": codec.name}
    metadata.pop("value_bits", None)
    if codec is CompactCodec:
        metadata["value_bits"] = value_bits
    for name, limit in (("top_p", top_p), ("top_k", top_k)):
        if limit is not None:
            metadata[name] = min(limit, metadata.get(name) or limit)
    lengths = store.document_lengths

    def write(documents: range, report: Progress) -> None:
        with LogitStoreWriter(
            path,
            vocab_size=store.vocab_size,
            document_lengths=lengths,
            metadata=metadata,
            codec=codec,
            value_bits=value_bits,
            statistics=store.statistics_of(documents),
            token_digests=store.token_digests(documents),
            documents=documents,
            kind="sampled" if store.draws else "top",
            draws=store.draws,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            written = writer.written_rows
            report(int(written.sum()))
            lacking = np.flatnonzero(written < lengths[documents.start : documents.stop])
            for document, offset, rows in scan_documents(store, lacking + documents.start):
                report(writer.append_run(document, offset, cut_rows(rows, top_p, top_k)))

    shards = store.shard_documents
    if shard_rows:
        shards = plan_copies(whole(store), lengths, shard_rows)
    for _ in run_jobs(write, shards, workers, progress):
        pass
    return LogitStore(path)


def cut_rows(
    rows: TeacherRows, top_p: float | None = None, top_k: int | None = None
) -> TeacherRows:
    """The top-p of every row, then the top-k of that; the mass counts over the full vocabulary."""
    if top_p is None and top_k is None:
        return rows
    counts = rows.counts
    if top_p is not None and top_p < 1:
        mask = np.arange(rows.ids.shape[1]) < counts[:, None]
        probs = np.where(mask, np.exp(rows.logprobs.astype(np.float64)), 0.0)
        before = np.cumsum(probs, axis=1) - probs
        counts = np.minimum(counts, (before < top_p).sum(1))
    if top_k is not None:
        counts = np.minimum(counts, top_k)
    width = int(counts.max(initial=0))
    beyond = np.arange(width) >= counts[:, None]
    return TeacherRows(
        np.where(beyond, np.int32(-1), rows.ids[:, :width]),
        np.where(beyond, np.float32(0), rows.logprobs[:, :width]),
        counts.astype(np.int32),
        rows.statistics,
    )


def _check_cut(store: LogitStore, top_p: float | None, top_k: int | None) -> None:
    if top_p is not None and not 0 < top_p <= 1:
        raise StoreError(f"--top-p is {top_p}; it is a probability mass, in (0, 1].")
    if top_k is not None and top_k < 1:
        raise StoreError(f"--top-k is {top_k}; at least one entry of a row must be kept.")
    if store.draws and (top_p is not None or top_k is not None):
        raise StoreError(
            f"{store.path} holds samples ({store.draws} draws a row), whose mean is right only as "
            "long as all are there: recode it without --top-p and --top-k."
        )

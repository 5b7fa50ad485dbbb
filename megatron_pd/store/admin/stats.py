"""Figures of a store: sizes, kept mass, and how good the teacher is on the true tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.admin.scan import document_groups, sampled_documents, scan_documents
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import TeacherRows

__all__ = ["kept_mass", "store_stats"]

_AVERAGED_STATISTICS = ("label_logprob", "entropy")


def kept_mass(rows: TeacherRows) -> np.ndarray:
    """Probability mass of each row's entries: float64 [n], 0 for rows without entries."""
    mask = np.arange(rows.ids.shape[1]) < rows.counts[:, None]
    return np.where(mask, np.exp(rows.logprobs.astype(np.float64)), 0.0).sum(1)


def store_stats(
    store: LogitStore,
    max_rows: int | None = None,
    workers: int = 1,
    progress: Progress = lambda rows: None,
) -> dict[str, Any]:
    """Sizes over the whole store, averages over the rows of `sampled_documents(store, max_rows)`.

    Means are over rows that have entries (a document's last row has none); `teacher_loss` and
    `teacher_perplexity` need the statistic `label_logprob`, `entropy` the one of that name, in
    nats; None where the store lacks it. `progress` is told rows.
    """

    def sums_of(documents: np.ndarray, report: Progress) -> np.ndarray:
        sums = np.zeros(3 + 2 * len(_AVERAGED_STATISTICS))
        for _, _, rows in scan_documents(store, documents):
            sums += _sums(rows)
            report(len(rows))
        return sums

    groups = document_groups(store, sampled_documents(store, max_rows))
    totals = np.zeros(3 + 2 * len(_AVERAGED_STATISTICS))
    for _, sums in run_jobs(sums_of, groups, workers, progress):
        totals += sums
    rows_read, taught, mass, *statistic_sums = totals.tolist()
    label, entropy = (
        total / n if n else None
        for total, n in zip(statistic_sums[::2], statistic_sums[1::2], strict=True)
    )
    tokens = int(store.document_lengths.sum())
    return {
        "kind": "sampled" if store.draws else "top",
        "vocab_size": store.vocab_size,
        "documents": store.num_documents,
        "missing_documents": sum(map(len, store.missing_documents())),
        "rows": tokens,
        "entries": store.num_entries,
        "bytes": store.nbytes,
        "max_entries_of_a_row": store.max_count,
        "entries_per_token": store.num_entries / max(1, tokens),
        "bytes_per_token": store.nbytes / max(1, tokens),
        "bytes_per_entry": store.nbytes / max(1, store.num_entries),
        "rows_read": int(rows_read),
        "rows_without_teacher": int(rows_read - taught),
        "mean_kept_mass": mass / max(1, taught),
        "teacher_loss": None if label is None else -label,
        "teacher_perplexity": None if label is None else math.exp(-label),
        "entropy": entropy,
    }


def _sums(rows: TeacherRows) -> np.ndarray:
    """Rows, rows with entries, their mass; sum and number of the known values of each statistic."""
    taught = rows.counts > 0
    sums = [len(rows), taught.sum(), kept_mass(rows).sum()]
    for name in _AVERAGED_STATISTICS:
        values = rows.statistics.get(name, np.zeros(0, np.float32)).astype(np.float64)
        values = values[np.isfinite(values) & taught] if len(values) else values
        sums += [values.sum(), len(values)]
    return np.array(sums, np.float64)

"""Figures of a store: sizes, kept mass, and how good the teacher is on the true tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_pd.store.reader import LogitStore
from megatron_pd.store.rows import TeacherRows

__all__ = ["kept_mass", "sampled_documents", "store_stats"]


def kept_mass(rows: TeacherRows) -> np.ndarray:
    """Probability mass of each row's entries: float64 [n], 0 for rows without entries."""
    mask = np.arange(rows.ids.shape[1]) < rows.counts[:, None]
    return np.where(mask, np.exp(rows.logprobs.astype(np.float64)), 0.0).sum(1)


def sampled_documents(store: LogitStore, max_rows: int | None) -> Iterator[int]:
    """Documents in corpus order, spread evenly so that they hold about `max_rows` rows (None: all
    documents)."""
    lengths = store.document_lengths
    stride = 1 if max_rows is None else max(1, math.ceil(lengths.sum() / max(1, max_rows)))
    yield from np.flatnonzero(lengths)[::stride].tolist()


def store_stats(
    store: LogitStore,
    max_rows: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Sizes over the whole store, averages over the rows of `sampled_documents(store, max_rows)`.

    Means are over rows that have entries (a document's last row has none); `teacher_loss` and
    `teacher_perplexity` need the column `label_logprob`, `entropy` the column of that name, in
    nats; None where the store lacks it.
    """
    rows_read = with_teacher = 0
    mass = 0.0
    sums: dict[str, list[float]] = {"label_logprob": [0.0, 0.0], "entropy": [0.0, 0.0]}
    for document in sampled_documents(store, max_rows):
        rows = store.read(document)
        taught = rows.counts > 0
        rows_read += len(rows)
        with_teacher += int(taught.sum())
        mass += float(kept_mass(rows).sum())
        for name, total in sums.items():
            values = rows.columns.get(name, np.zeros(0, np.float32)).astype(np.float64)
            values = values[np.isfinite(values) & taught] if len(values) else values
            total[0] += float(values.sum())
            total[1] += len(values)
        progress(len(rows))
    label, entropy = (total / n if n else None for total, n in sums.values())
    return {
        "kind": "sampled" if store.draws else "top",
        "vocab_size": store.vocab_size,
        "documents": store.num_documents,
        "rows": store.num_rows,
        "entries": store.num_entries,
        "bytes": store.nbytes,
        "max_entries_of_a_row": store.max_count,
        "entries_per_token": store.num_entries / max(1, store.num_rows),
        "bytes_per_token": store.nbytes / max(1, store.num_rows),
        "bytes_per_entry": store.nbytes / max(1, store.num_entries),
        "rows_read": rows_read,
        "rows_without_teacher": rows_read - with_teacher,
        "mean_kept_mass": mass / max(1, with_teacher),
        "teacher_loss": None if label is None else -label,
        "teacher_perplexity": None if label is None else math.exp(-label),
        "entropy": entropy,
    }

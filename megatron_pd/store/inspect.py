"""A store for human eyes: summary, a window of tokens with their candidates, histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_pd.store.reader import LogitStore
from megatron_pd.store.rows import Corpus, StoreError
from megatron_pd.store.stats import kept_mass, sampled_documents

__all__ = ["plot_histograms", "summary", "window"]

_PLOTTED_ROWS = 200_000


def summary(store: LogitStore) -> dict[str, Any]:
    """What the store's manifest, headers and footers say; reads no rows."""
    return {
        "path": str(store.path),
        "kind": f"sampled, {store.draws} draws" if store.draws else "top",
        "vocab_size": store.vocab_size,
        "documents": store.num_documents,
        "missing_documents": sum(map(len, store.missing_documents())),
        "rows": store.num_rows,
        "entries": store.num_entries,
        "max_entries_of_a_row": store.max_count,
        "bytes": store.nbytes,
        "bytes_per_token": round(store.nbytes / max(1, store.num_rows), 2),
        "metadata": store.metadata,
    }


def window(
    store: LogitStore,
    span: tuple[int, int, int],
    top: int,
    corpus: Corpus | None = None,
    piece_of: Callable[[int], str] = str,
) -> list[str]:
    """A line per token of span (document, offset, length): kept mass, entries and the likeliest
    `top` next tokens with their probabilities; with a corpus also the token and the one that
    followed, marked * among the candidates."""
    document, offset, length = span
    available = int(store.document_lengths[document]) if document < store.num_documents else 0
    if not 0 <= offset < available:
        raise StoreError(
            f"{store.path}: --document {document} --offset {offset}: that document has {available} "
            "rows."
        )
    rows = store.read(document, offset, min(length, available - offset))
    masses = kept_mass(rows)
    tokens = None if corpus is None else corpus.tokens(document)
    lines = []
    for row, count in enumerate(rows.counts.tolist()):
        position = offset + row
        following = None
        head = f"{position:6}"
        if tokens is not None:
            following = int(tokens[position + 1]) if position + 1 < len(tokens) else None
            head += f" {piece_of(int(tokens[position])):>16} →"
        candidates = "  ".join(
            f"{piece_of(id_)}{'*' if id_ == following else ''} {np.exp(logprob):.3f}"
            for id_, logprob in zip(
                rows.ids[row, : min(top, count)].tolist(), rows.logprobs[row].tolist(), strict=False
            )
        )
        lines.append(f"{head} {masses[row]:.3f} {count:4}  {candidates or 'no teacher'}")
    return lines


def plot_histograms(store: LogitStore, path: str) -> None:
    """Entry counts and kept mass of the rows (about 200,000 of a larger store) as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [store.read(document) for document in sampled_documents(store, _PLOTTED_ROWS)]
    counts = np.concatenate([part.counts for part in parts] or [np.zeros(0, np.int32)])
    masses = np.concatenate([kept_mass(part) for part in parts] or [np.zeros(0)])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.hist(counts, bins=np.arange(int(counts.max(initial=0)) + 2) - 0.5)
    left.set(xlabel="entries of a row", ylabel="rows")
    right.hist(masses[counts > 0], bins=100, range=(0, 1))
    right.set(xlabel="kept probability mass", ylabel="rows")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

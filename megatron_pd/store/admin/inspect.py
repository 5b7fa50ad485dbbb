"""A store for human eyes: summary, a window of tokens with their candidates, histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_pd.store.admin.scan import sampled_documents, scan_documents
from megatron_pd.store.admin.stats import kept_mass
from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import Corpus, StoreError

__all__ = ["plot_histograms", "summary", "window"]

_PLOTTED_ROWS = 200_000
_MASS_BINS = 100


def summary(store: LogitStore) -> dict[str, Any]:
    """What the store's manifest, headers and footers say; reads no rows."""
    missing = sum(map(len, store.missing_documents()))
    return {
        "path": str(store.path),
        "kind": f"sampled, {store.draws} draws" if store.draws else "top",
        "codec": ", ".join(sorted(store.codecs)),
        "value_bits": max(store.value_bits) if "compact" in store.codecs else None,
        "vocab_size": store.vocab_size,
        "documents": store.num_documents,
        "missing_documents": missing,
        "shards": len(store.shard_documents),
        "rows": store.num_rows,
        "entries": store.num_entries,
        "max_entries_of_a_row": store.max_count,
        "statistics": list(store.statistics),
        "bytes": store.nbytes,
        "bytes_per_token": None if missing else round(store.nbytes / max(1, store.num_rows), 2),
        "metadata": store.metadata,
    }


def window(
    store: LogitStore,
    span: tuple[int, int, int],
    top: int,
    corpus: Corpus | None = None,
    piece_of: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """What the store says of each token of span (document, offset, length).

    Returns:
        A dict per token: offset, mass, entries, statistics by name, `candidates` (the
        `top` ones: id, probability, and with `piece_of` text), and with a corpus token and
        next_token (None at the document's end) and, with `piece_of`, text and next_text.
    """
    document, offset, length = span
    available = store.document_length(document) if 0 <= document < store.num_documents else 0
    if not 0 <= offset < available:
        raise StoreError(
            f"{store.path}: --document {document} --offset {offset}: that document has {available} "
            "rows."
        )
    rows = store.read(document, offset, min(length, available - offset))
    tokens = None if corpus is None else corpus.tokens(document)
    masses = kept_mass(rows)
    described = []
    for row, count in enumerate(rows.counts.tolist()):
        position = offset + row
        entry: dict[str, Any] = {
            "offset": position,
            "mass": float(masses[row]),
            "entries": count,
            **{
                name: float(values[row])
                for name, values in rows.statistics.items()
                if np.isfinite(values[row])
            },
        }
        if tokens is not None:
            entry["token"] = int(tokens[position])
            entry["next_token"] = int(tokens[position + 1]) if position + 1 < available else None
        entry["candidates"] = [
            {"id": int(id_), "probability": float(np.exp(logprob))}
            for id_, logprob in zip(
                rows.ids[row, : min(top, count)], rows.logprobs[row], strict=False
            )
        ]
        if piece_of is not None:
            _add_texts(entry, piece_of)
        described.append(entry)
    return described


def _add_texts(entry: dict[str, Any], piece_of: Callable[[int], str]) -> None:
    for candidate in entry["candidates"]:
        candidate["text"] = piece_of(candidate["id"])
    for token, text in (("token", "text"), ("next_token", "next_text")):
        if entry.get(token) is not None:
            entry[text] = piece_of(entry[token])


def plot_histograms(store: LogitStore, path: str) -> None:
    """Entry counts and kept mass of the rows (about 200,000 of a larger store) as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.zeros(store.max_count + 1, np.int64)
    masses = np.zeros(_MASS_BINS, np.int64)
    edges = np.linspace(0, 1, _MASS_BINS + 1)
    for _, _, rows in scan_documents(store, sampled_documents(store, _PLOTTED_ROWS)):
        counts += np.bincount(rows.counts, minlength=len(counts))
        kept = kept_mass(rows)[rows.counts > 0].clip(max=1)
        masses += np.histogram(kept, edges)[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.bar(np.arange(len(counts)), counts, width=1)
    left.set(xlabel="entries of a row", ylabel="rows")
    right.stairs(masses, edges, fill=True)
    right.set(xlabel="kept probability mass", ylabel="rows")
    figure.suptitle(f"{store.path.name}: {counts.sum():,} of {store.num_rows:,} rows")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Random stores for the tests."""

from __future__ import annotations

import numpy as np

from megatron_pd.store import TeacherRows


class RandomCorpus:
    """Documents of random length (some empty, some of one token) with random tokens."""

    def __init__(self, rng: np.random.Generator, documents: int, vocab_size: int, mean: int = 40):
        self.document_lengths = rng.geometric(1 / mean, documents).astype(np.int64)
        self.document_lengths[rng.random(documents) < 0.05] = 0
        self._tokens = [rng.integers(0, vocab_size, n) for n in self.document_lengths]

    def tokens(self, document: int) -> np.ndarray:
        return self._tokens[document]


def random_rows(
    rng: np.random.Generator, n: int, vocab_size: int, width: int, statistics: bool = False
) -> TeacherRows:
    """n ragged top-k rows of Zipf-like teachers of random sharpness; the last one is empty."""
    rows = TeacherRows.empty(n, width)
    for row in range(n - 1):
        count = int(rng.integers(0, min(width, vocab_size) + 1))
        logits = -rng.uniform(0.1, 3.0) * np.log(np.arange(1, vocab_size + 1)) + rng.normal(
            0, rng.uniform(0, 2), vocab_size
        )
        logprobs = logits - np.logaddexp.reduce(logits)
        best = np.argsort(-logprobs)[:count]
        rows.ids[row, :count] = rng.permutation(vocab_size)[:count]
        rows.logprobs[row, :count] = logprobs[best]
        rows.counts[row] = count
    if not statistics:
        return rows
    extra = {name: rng.normal(size=n).astype(np.float32) for name in ("label_logprob", "entropy")}
    return TeacherRows(rows.ids, rows.logprobs, rows.counts, extra)


def assert_rows_equal(found: TeacherRows, expected: TeacherRows, exact: bool = True) -> None:
    """Same counts, ids and log-probabilities, whatever the padding; not `exact`: roughly, and in an
    order of their own."""
    np.testing.assert_array_equal(found.counts, expected.counts)
    for row, count in enumerate(expected.counts):
        ids, expected_ids = found.ids[row, :count], expected.ids[row, :count]
        order, expected_order = (
            (slice(None), slice(None)) if exact else (np.argsort(ids), np.argsort(expected_ids))
        )
        np.testing.assert_array_equal(ids[order], expected_ids[expected_order])
        np.testing.assert_allclose(
            found.logprobs[row, :count][order],
            expected.logprobs[row, :count][expected_order],
            atol=0 if exact else 0.2,
        )
        assert (found.ids[row, count:] == -1).all() and (found.logprobs[row, count:] == 0).all()

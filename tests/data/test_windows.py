import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pd.data.windows import batches_of, windows_of


class Corpus:
    """Documents whose tokens say where they are: 1000 · document + offset."""

    def tokens(self, document: int, offset: int, length: int) -> np.ndarray:
        return 1000 * document + np.arange(offset, offset + length)


@given(
    length=st.integers(1, 200),
    sequence_length=st.integers(1, 50),
    overlap_share=st.floats(0, 1, exclude_max=True),
)
def test_every_token_but_the_last_is_kept_once(length, sequence_length, overlap_share):
    overlap = int(overlap_share * sequence_length)
    windows = windows_of(3, length, sequence_length, overlap)
    kept = [
        position
        for window in windows
        for position in range(window.keep, window.start + window.length)
    ]
    assert kept == list(range(length - 1))
    for window in windows:
        assert 0 <= window.start <= window.keep
        assert 1 <= window.length <= sequence_length
    for before, after in itertools.pairwise(windows):
        assert after.keep - after.start in (overlap, before.length - 1, before.length)


def test_windows_of_a_long_document_overlap():
    assert [tuple(w) for w in windows_of(0, 21, 8, 2)] == [
        (0, 0, 8, 0),
        (0, 6, 8, 8),
        (0, 12, 8, 14),
    ]


@pytest.mark.parametrize("length_multiple", [1, 3])
def test_batches_hold_every_window_with_its_next_tokens(length_multiple):
    rng = np.random.default_rng()
    windows = [
        window
        for document in range(40)
        for window in windows_of(document, int(rng.integers(1, 500)), 192, 16)
    ]
    seen = []
    for batch in batches_of(
        Corpus(), windows, batch_size=8, sequence_length=192, length_multiple=length_multiple
    ):
        assert batch.tokens.shape == batch.labels.shape
        assert batch.tokens.shape[1] % length_multiple == 0
        assert batch.tokens.shape[1] <= 192
        for row, window in enumerate(batch.windows):
            expected = torch.from_numpy(
                Corpus().tokens(window.document, window.start, window.length + 1)
            )
            torch.testing.assert_close(batch.tokens[row, : window.length], expected[:-1])
            torch.testing.assert_close(batch.labels[row, : window.length], expected[1:])
            seen.append(window)
    assert sorted(seen) == sorted(windows)

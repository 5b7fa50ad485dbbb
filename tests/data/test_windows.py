import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pd.data.windows import batches_of, document_groups, windows_of


class Corpus:
    """Documents whose tokens say where they are: 1000 · document + offset."""

    def tokens(self, document: int, offset: int, length: int) -> np.ndarray:
        return 1000 * document + np.arange(offset, offset + length)

    def gather(self, *spans: np.ndarray) -> np.ndarray:
        return np.concatenate([self.tokens(*span) for span in zip(*spans, strict=True)])


def cut(length: int, sequence_length: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, length, keep) of a document's windows, one after the other."""
    windows = []
    start, kept = 0, 0
    while kept < length - 1:
        end = min(start + sequence_length, length - 1)
        windows.append((start, end - start, kept))
        kept = end
        start = end - overlap
    return windows


@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 200)), max_size=20),
    sequence_length=st.integers(1, 50),
    overlap_share=st.floats(0, 1, exclude_max=True),
)
def test_every_token_but_the_last_is_kept_once(lengths, sequence_length, overlap_share):
    overlap = int(overlap_share * sequence_length)
    numbers = np.arange(len(lengths)) * 7 + 3
    windows = windows_of(numbers, np.array(lengths, np.int64), sequence_length, overlap)
    found = list(
        zip(windows.documents, windows.starts, windows.lengths, windows.keeps, strict=True)
    )
    assert found == [
        (number, *window)
        for number, length in zip(numbers, lengths, strict=True)
        for window in cut(length, sequence_length, overlap)
    ]
    documents, offsets, own = windows.rows
    assert list(zip(documents[own], offsets[own], strict=True)) == [
        (number, offset)
        for number, length in zip(numbers, lengths, strict=True)
        for offset in range(length - 1)
    ]
    assert list(zip(documents, offsets, strict=True)) == [
        (document, start + i) for document, start, length, _ in found for i in range(length)
    ]


def test_windows_of_a_long_document_overlap():
    windows = windows_of(np.array([5]), np.array([21]), 8, 2)
    assert windows.starts.tolist() == [0, 6, 12]
    assert windows.lengths.tolist() == [8, 8, 8]
    assert windows.keeps.tolist() == [0, 8, 14]


@given(lengths=st.lists(st.integers(0, 30), max_size=60), tokens=st.integers(1, 100))
def test_groups_of_documents_are_all_of_them_in_order(lengths, tokens):
    groups = list(document_groups(np.array(lengths, np.int64), tokens))
    assert [i for group in groups for i in range(len(lengths))[group]] == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[group][:-1]) <= tokens


@pytest.mark.parametrize("length_multiple", [1, 3])
def test_batches_hold_every_window_with_its_next_tokens(length_multiple):
    rng = np.random.default_rng()
    lengths = rng.choice([rng.integers(1, 500, 60), rng.integers(1, 9, 60)])
    windows = windows_of(np.arange(60), lengths, 192, 16)
    seen = []
    for batch in batches_of(
        Corpus(), windows, batch_size=8, sequence_length=192, length_multiple=length_multiple
    ):
        rows, length = batch.tokens.shape
        longest = int(batch.windows.lengths.max())
        assert batch.labels.shape == batch.filled.shape == batch.kept.shape == (rows, length)
        assert length % length_multiple == 0 and longest <= length <= 192
        assert length <= longest * 1.25 * length_multiple
        assert rows <= max(8, 8 * 192 // length)
        documents, offsets, own = batch.windows.rows
        at = torch.from_numpy(1000 * documents + offsets)
        torch.testing.assert_close(batch.tokens[batch.filled], at)
        torch.testing.assert_close(batch.labels[batch.filled], at + 1)
        torch.testing.assert_close(batch.tokens[batch.kept], at[torch.from_numpy(own)])
        seen += batch.tokens[batch.kept].tolist()
    assert sorted(seen) == [
        1000 * document + offset
        for document, length in enumerate(lengths)
        for offset in range(length - 1)
    ]


def test_batches_of_short_documents_have_as_many_tokens_as_those_of_long_ones():
    for length in (3, 193):
        lengths = np.full(12_288 // (length - 1), length)
        batches = list(
            batches_of(
                Corpus(),
                windows_of(np.arange(len(lengths)), lengths, 192, 0),
                batch_size=8,
                sequence_length=192,
            )
        )
        assert len(batches) == 8

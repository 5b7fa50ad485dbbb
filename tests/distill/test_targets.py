import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pd.distill.targets import TeacherTargets, sample, top_p_k, truncate
from megatron_pd.errors import UserError


def random_logits(seed: int, rows: int = 7, vocab_size: int = 40, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def nucleus_by_hand(logits_V: torch.Tensor, top_p: float, top_k: int) -> dict[int, float]:
    """The most likely tokens one by one, up to and with the one that reaches p, or k of them."""
    probs = torch.softmax(logits_V.double(), dim=-1)
    kept: dict[int, float] = {}
    for token in torch.argsort(probs, descending=True).tolist():
        kept[token] = probs[token].item()
        if len(kept) == top_k or sum(kept.values()) >= top_p:
            break
    return kept


def as_dicts(targets: TeacherTargets) -> list[dict[int, float]]:
    return [
        dict(zip(ids[:count].tolist(), logprobs[:count].exp().tolist(), strict=True))
        for ids, logprobs, count in zip(
            targets.ids, targets.logprobs, targets.counts.tolist(), strict=True
        )
    ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), top_p=st.floats(0.01, 0.999), top_k=st.integers(1, 60))
def test_top_p_k_is_the_nucleus_cut_to_k(seed, top_p, top_k):
    logits = random_logits(seed)
    rows = top_p_k(logits, top_p, top_k)
    for row, logits_V in zip(as_dicts(rows), logits, strict=True):
        expected = nucleus_by_hand(logits_V, top_p, top_k)
        assert row == pytest.approx(expected, rel=1e-5)


def test_the_token_that_crosses_p_is_kept_and_ends_the_row():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert top_p_k(logits, 0.6).counts.item() == 2
    assert top_p_k(logits, 0.7499).counts.item() == 2
    assert top_p_k(logits, 0.7501).counts.item() == 3
    assert top_p_k(logits, 1e-9).counts.item() == 1
    assert top_p_k(logits, 1.0).counts.item() == 4
    assert top_p_k(logits).counts.item() == 4


def test_layout_of_a_row():
    rows = top_p_k(torch.tensor([[0.7, 0.1, 0.2], [0.4, 0.3, 0.3]]).log(), 0.8, 3)
    assert rows.ids.dtype == torch.int32
    assert rows.logprobs.dtype == torch.float32
    assert rows.counts.dtype == torch.int32
    assert rows.ids[0].tolist() == [0, 2, -1]
    assert rows.logprobs[0].tolist() == pytest.approx([math.log(0.7), math.log(0.2), 0.0])
    assert rows.mask.tolist() == [[True, True, False], [True, True, True]]


def test_impossible_ids_are_never_kept():
    logits = torch.tensor([1.0, -math.inf, 0.0, -math.inf])
    rows = top_p_k(logits, top_k=4)
    assert rows.counts.item() == 2
    assert rows.ids.tolist() == [0, 2, -1, -1]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    stored_p=st.floats(0.5, 1.0),
    stored_k=st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1.0),
    top_k=st.none() | st.integers(1, 60),
)
def test_truncating_stored_rows_is_truncating_the_dense_distribution(
    seed, stored_p, stored_k, top_p, top_k
):
    logits = random_logits(seed)
    stored = top_p_k(logits, stored_p, stored_k)
    cut = truncate(stored, top_p, top_k)
    smaller_p = min(stored_p, top_p or 1.0)
    smaller_k = min(stored_k, top_k or stored_k)
    expected = top_p_k(logits, smaller_p, smaller_k)
    width = expected.ids.shape[-1]
    assert torch.equal(cut.counts, expected.counts)
    assert torch.equal(cut.ids[:, :width], expected.ids[:, : cut.ids.shape[-1]])
    assert torch.equal(cut.logprobs[:, :width], expected.logprobs[:, : cut.ids.shape[-1]])


def test_truncation_keeps_empty_rows_empty_and_the_statistics():
    rows = TeacherTargets(
        ids=torch.tensor([[-1, -1], [4, 2]], dtype=torch.int32),
        logprobs=torch.tensor([[0.0, 0.0], [-0.1, -3.0]]),
        counts=torch.tensor([0, 2], dtype=torch.int32),
        entropy=torch.tensor([0.0, 0.7]),
        std=torch.tensor([0.0, 2.5]),
    )
    cut = truncate(rows, 0.5, 2)
    assert cut.counts.tolist() == [0, 1]
    assert cut.ids.tolist() == [[-1, -1], [4, -1]]
    assert cut.entropy is rows.entropy
    assert cut.std is rows.std


def test_sampled_rows_are_shares_of_the_draws_and_unbiased():
    seed = torch.seed()
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(11, generator=generator) * 2
    draws, rows_count = 12, 4000
    rows = sample(logits_V.expand(2, rows_count // 2, -1), draws, generator)
    assert rows.ids.shape == (2, rows_count // 2, draws)
    rows = rows.map(lambda x: x.flatten(0, 1))
    counts = torch.where(rows.mask, rows.logprobs.exp() * draws, 0.0)
    assert torch.allclose(counts, counts.round(), atol=1e-5)
    assert torch.allclose(counts.sum(-1), torch.full((rows_count,), float(draws)))
    assert (rows.logprobs.diff(dim=-1)[rows.mask[:, 1:]] <= 0).all()

    shares = torch.zeros(rows_count, 11).scatter_add_(
        1, rows.ids.long().clamp(min=0), torch.where(rows.mask, rows.logprobs.exp(), 0.0)
    )
    probs = torch.softmax(logits_V, dim=-1)
    standard_error = (probs * (1 - probs) / (draws * rows_count)).sqrt()
    assert ((shares.mean(0) - probs).abs() < 6 * standard_error).all()


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((0.0, None), "--pd-top-p"),
        ((1.5, None), "--pd-top-p"),
        ((float("nan"), None), "--pd-top-p"),
        ((None, 0), "--pd-top-k"),
    ],
)
def test_bad_truncations_name_the_flag(arguments, flag):
    with pytest.raises(UserError, match=flag):
        top_p_k(torch.zeros(3), *arguments)
    with pytest.raises(UserError, match=flag):
        truncate(top_p_k(torch.zeros(3)), *arguments)


def test_rows_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        TeacherTargets(
            torch.zeros(2, 3, dtype=torch.int32),
            torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.int32),
        )

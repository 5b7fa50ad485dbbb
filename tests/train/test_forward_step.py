"""The loss of a micro-batch as Megatron takes it: a sum, a count, and what is logged."""

from types import SimpleNamespace

import pytest
import torch

from megatron_pd.train import forward_step


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    args = SimpleNamespace(check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    monkeypatch.setattr(forward_step, "get_args", lambda: args)


def ratio(entry: torch.Tensor) -> float:
    return (entry[0] / entry[1]).item()


def test_sums_and_what_is_logged():
    lm, kd = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [0.0, 7.0]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    counts = torch.tensor([[3, 3], [0, 2]])
    loss, tokens, report = forward_step.pd_loss(mask, counts, 0.75, torch.stack([lm, kd]))
    # the second token is masked, the third has no teacher
    assert loss.item() == pytest.approx((0.25 * 1 + 0.75 * 5) + 3 + (0.25 * 4 + 0.75 * 7))
    assert tokens.item() == 3
    assert ratio(report["lm loss"]) == pytest.approx((1 + 3 + 4) / 3)
    assert ratio(report["kd loss"]) == pytest.approx((5 + 7) / 2)
    assert ratio(report["alpha"]) == 0.75
    assert ratio(report["teacher tokens"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("counts", [0, 5])
def test_a_micro_batch_that_is_all_masked_is_zero(counts):
    losses = torch.randn(2, 2, 3).abs().requires_grad_()
    loss, tokens, report = forward_step.pd_loss(
        torch.zeros(2, 3), torch.full((2, 3), counts), 0.9, losses
    )
    loss.backward()
    assert loss.item() == tokens.item() == 0
    assert torch.equal(losses.grad, torch.zeros_like(losses))
    assert all(torch.isfinite(entry).all() for entry in report.values())
    assert ratio(report["kd loss"]) == ratio(report["lm loss"]) == 0

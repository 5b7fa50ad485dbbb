"""The tables of docs/losses.md are the registries' own words."""

from pathlib import Path

import pytest

from megatron_pd.distill.losses import LOSSES
from megatron_pd.distill.tails import TAILS
from megatron_pd.ops import FUSED_LOSSES, FUSED_TAILS, is_fused

DOCS = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_line(name: str) -> None:
    label = f"`{name}`{' (default)' if name == 'kld' else ''}"
    assert f"\n| {label} | {LOSSES.get(name).formula} |\n" in DOCS


@pytest.mark.parametrize("name", TAILS)
def test_every_tail_policy_has_its_line(name: str) -> None:
    tail = TAILS.get(name)
    label = f"`{name}`{' (default)' if name == 'renormalize' else ''}"
    assert f"\n| {label} | {tail.target} | {tail.gradient} | {tail.bias} |\n" in DOCS


def test_what_is_fused_is_registered() -> None:
    assert set(FUSED_LOSSES) <= set(LOSSES) and set(FUSED_TAILS) <= set(TAILS)
    assert is_fused("kld", "ghost") and not is_fused("mse-logit", "renormalize")
    assert not is_fused("kld", "my_module:my_tail")

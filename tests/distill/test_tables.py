"""The tables of docs/losses.md are the registries' own words."""

from pathlib import Path

import pytest

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.losses import LOSSES
from megatron_pd.distill.schedules import ALPHA_SCHEDULES
from megatron_pd.distill.tails import TAILS
from megatron_pd.ops import FUSED_LOSSES, FUSED_TAILS, is_fused

DOCS = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()


def label_of(name: str) -> str:
    default = PDConfig()
    is_default = name in (default.loss, default.tail, default.alpha_schedule)
    return f"`{name}` (default)" if is_default else f"`{name}`"


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_line(name: str) -> None:
    assert f"\n| {label_of(name)} | {LOSSES.get(name).formula} |\n" in DOCS


@pytest.mark.parametrize("name", TAILS)
def test_every_tail_policy_has_its_line(name: str) -> None:
    tail = TAILS.get(name)
    assert f"\n| {label_of(name)} | {tail.target} | {tail.gradient} | {tail.bias} |\n" in DOCS


@pytest.mark.parametrize("name", ALPHA_SCHEDULES)
def test_every_alpha_schedule_has_its_line(name: str) -> None:
    assert f"\n| {label_of(name)} | {ALPHA_SCHEDULES.get(name).summary} |\n" in DOCS


def test_what_is_fused_is_registered() -> None:
    assert set(FUSED_LOSSES) <= set(LOSSES) and set(FUSED_TAILS) <= set(TAILS)
    assert is_fused("kld", "ghost") and not is_fused("mse-logit", "renormalize")
    assert not is_fused("kld", "my_module:my_tail")

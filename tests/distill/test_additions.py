"""A loss, a tail policy and an α schedule from outside: CONTRIBUTING.md's own, and others."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pd.distill import losses, schedules, tails
from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.losses import LOSSES, Loss
from megatron_pd.distill.objective import composed_loss, distillation_loss
from megatron_pd.distill.schedules import AlphaCurve, AlphaSchedule, alpha_at
from megatron_pd.distill.tails import TailPolicy
from megatron_pd.distill.targets import TeacherTargets, top_p_k
from megatron_pd.errors import UserError
from megatron_pd.registry import Registry

CONTRIBUTING = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
PARTS = "### … a loss", "### … a tail policy", "### … an α schedule"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Gives a thing a name to import it by."""

    def name_of(thing: Any) -> str:
        monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(thing=thing))
        return "outside:thing"

    return name_of


def example(part: str, module: ModuleType, registry: str) -> Any:
    """What the example adds, run as a part of the module that it says, with an empty registry."""
    found = re.search(rf"^{part}\n.*?```python\n(.*?)```", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    assert found is not None
    kind = {"LOSSES": Loss, "TAILS": TailPolicy, "ALPHA_SCHEDULES": AlphaCurve}[registry]
    added: Registry[Any] = Registry("addition", kind)
    exec(found[1], {**vars(module), registry: added})
    (name,) = added.names
    return added.get(name)


Case = tuple[TeacherTargets, Tensor, Tensor, Tensor]


@pytest.fixture
def case() -> Case:
    """Rows, the student's log-probabilities at them and at the labels, and the labels."""
    teacher = top_p_k(torch.randn(5, 40), 0.9, 6)
    teacher.counts[2] = 0
    logq_TV = torch.log_softmax(torch.randn(5, 40, dtype=torch.float64), dim=-1)
    logq_TK = torch.where(teacher.mask, logq_TV.gather(-1, teacher.ids.long().clamp(min=0)), 0.0)
    return teacher, logq_TK, logq_TV[:, 0], torch.zeros(5, dtype=torch.long)


def test_the_loss_of_contributing(case: Case, outside: Callable[[Any], str]) -> None:
    loss = outside(example(PARTS[0], losses, "LOSSES"))
    teacher, logq_TK, *_ = case
    found = distillation_loss(PDConfig(loss=loss, tail="raw"), *case)
    t = teacher.logprobs.double().exp()
    expected = ((t.sqrt() - logq_TK.exp().sqrt()).square() * teacher.mask).sum(-1)
    torch.testing.assert_close(found, expected)


def test_the_tail_policy_of_contributing(case: Case, outside: Callable[[Any], str]) -> None:
    tail = outside(example(PARTS[1], tails, "TAILS"))
    teacher, logq_TK, *_ = case
    found = distillation_loss(PDConfig(tail=tail), *case)
    torch.testing.assert_close(found, torch.where(teacher.counts > 0, -logq_TK[:, 0], 0.0))


def test_the_alpha_schedule_of_contributing(outside: Callable[[Any], str]) -> None:
    curve = outside(example(PARTS[2], schedules, "ALPHA_SCHEDULES"))
    schedule = AlphaSchedule(curve, max=0.9, min=0.1)
    assert [alpha_at(schedule, step, 10) for step in (0, 5, 10)] == pytest.approx([0.1, 0.3, 0.9])


def test_what_is_imported_is_composed(case: Case, outside: Callable[[Any], str]) -> None:
    """Not even a built-in goes to the operator by another name."""
    built_in = PDConfig(loss="kld", tail="ghost", temperature=2.0)
    config = replace(built_in, loss=outside(LOSSES.get("kld")))
    found = distillation_loss(config, *case)
    assert torch.equal(found, composed_loss(built_in, *case))
    torch.testing.assert_close(found, distillation_loss(built_in, *case))


def test_a_curves_phases_are_its_flags(outside: Callable[[Any], str]) -> None:
    curve = AlphaCurve(lambda schedule, done: schedule.warmup, "level", phases=("warmup", "end"))
    name = outside(curve)
    assert PDConfig(alpha_schedule=name, alpha_warmup=0.2).alpha_min == 0.0
    with pytest.raises(UserError, match=r"--pd-alpha-decay is 0\.2, which nothing uses.*wsd"):
        PDConfig(alpha_schedule=name, alpha_decay=0.2)


def test_a_loss_that_is_no_number_a_row_is_named(case: Case, outside: Callable[[Any], str]) -> None:
    of_all_rows = Loss(lambda rows, parts, config: rows.log_q.sum(), "a single number")
    config = PDConfig(loss=outside(of_all_rows))
    with pytest.raises(ValueError, match=r"outside:thing gave .* \(\) for rows of shape \(5,\)"):
        distillation_loss(config, *case)


@pytest.mark.parametrize("flag", ["loss", "tail", "alpha_schedule"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:x", "can't be imported .*no_such_module.*PYTHONPATH"),
        ("math:no_such", "can't be imported .*no_such"),
        ("math:pi", "math:pi is a float, which is no .*CONTRIBUTING.md"),
        ("x", "it must be one of .*, or your own as package.module:attribute"),
    ],
)
def test_a_name_of_nothing_is_a_sentence_with_its_flag(flag: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--pd-{flag.replace('_', '-')}.*{words}"):
        PDConfig(**{flag: name})

"""The experiments: their flags by Megatron's parser, their reports, a minimum known in advance."""

import json
import sys
from pathlib import Path

import compare_tails
import plot_tails
import pytest
import torch
from megatron.training.arguments import parse_args
from small_teacher import DRAWS, SmallTeacher, sampled_store, teacher_stages

from megatron_pd.distill.config import PDConfig
from megatron_pd.megatron.arguments import add_pd_arguments, pd_config_from_args


@pytest.mark.parametrize("name", compare_tails.SETTINGS)
def test_every_setting_is_a_student_that_megatron_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = SmallTeacher()
    command = demo.training(
        "s", demo.student, *compare_tails.flags_of(demo, name, seed=5), processes=1
    )
    monkeypatch.setattr(sys, "argv", command[command.index("megatron_pd.pretrain") :])
    args = parse_args(add_pd_arguments)
    assert args.seed == 5 and args.micro_batch_size == args.global_batch_size
    config = pd_config_from_args(args)
    assert (config is None) == (name == "lm-only")
    if name.startswith("sampled"):
        assert args.pd_store == [sampled_store(demo)]


def test_the_stores_are_of_the_same_teacher_and_corpus() -> None:
    demo = SmallTeacher(seed=2)
    *_, top, sampled = (stage.command for stage in teacher_stages(demo))
    assert isinstance(top, list) and isinstance(sampled, list)
    kept = ["--dump-top-p", "0.95", "--dump-top-k", "50"]
    drawn = ["--dump-sampled", str(DRAWS), "--dump-store", sampled_store(demo)]
    assert [word for word in top if word not in kept] == [
        word for word in sampled if word not in drawn
    ]


def test_gains_are_over_lm_only_of_the_same_seed(tmp_path: Path) -> None:
    demo = SmallTeacher(seed=1, root=tmp_path)
    demo.folder.mkdir()
    figures = {"lm-only": {1: 3.0, 2: 2.5}, "ghost-wsd-0.9": {2: 2.4, 3: 2.75}}
    for name, losses in figures.items():
        for seed, loss in losses.items():
            file = demo.folder / f"{name}-seed-{seed}.json"
            file.write_text(json.dumps({"lm_loss": loss, "ece": loss / 100}))
    lines = compare_tails.report(demo).splitlines()
    assert lines[2:] == [
        "| lm-only | 1, 2 | 3.000 / 2.500 | 0.000 / 0.000 | 0.030 / 0.025 |",
        "| ghost-wsd-0.9 | 2, 3 | 2.400 / 2.750 | 0.100 | 0.024 / 0.028 |",
    ]


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_the_minimum_of_a_tail_policy(tail: str) -> None:
    teacher_V = plot_tails.zipf(40)
    kept = teacher_V[:5].sum()
    expected_V = torch.full_like(teacher_V, float(1 - kept) / 35 if tail == "ghost" else 0.0)
    expected_V[:5] = teacher_V[:5] if tail == "ghost" else teacher_V[:5] / kept
    student_V = plot_tails.minimiser(PDConfig(tail=tail), teacher_V, columns=5)
    torch.testing.assert_close(student_V, expected_V, rtol=1e-3, atol=1e-3)

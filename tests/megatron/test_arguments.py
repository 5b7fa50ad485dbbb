"""The --pd-* flags through Megatron's own parser, the recipes, α over a run."""

import argparse
import re
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from megatron_pd.distill.config import PDConfig, flag_of
from megatron_pd.distill.recipes import RECIPES
from megatron_pd.distill.schedules import AlphaCurve, AlphaSchedule, alpha_at
from megatron_pd.errors import UserError
from megatron_pd.megatron import cpu
from megatron_pd.megatron.arguments import (
    LearningRate,
    add_pd_arguments,
    learning_rate_of_flags,
    pd_config_from_args,
    resolve_schedule,
    total_samples,
)

RUN = "--train-iters 1000 --global-batch-size 8 --lr 1e-3".split()


def parse(monkeypatch, *flags: str, run: list[str] = RUN) -> argparse.Namespace:
    cpu.install()
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain", *run, *flags])
    return parse_args(add_pd_arguments)


# one value other than the default for each flag, with what else it needs
SETTINGS = {
    "store": (["a.pd", "b.pd"], ("a.pd", "b.pd"), ""),
    "loss": (["reverse-kld"], "reverse-kld", ""),
    "tail": (["ghost"], "ghost", ""),
    "top_p": (["0.9"], 0.9, ""),
    "top_k": (["12"], 12, ""),
    "temperature": (["2.5"], 2.5, ""),
    "student_temperature": (["1.5"], 1.5, ""),
    "tau_squared": ([], True, ""),
    "adaptive_temperature": (["normkd"], "normkd", ""),
    "adaptive_slope": (["0.7"], 0.7, "--pd-adaptive-temperature adakd-sd"),
    "adaptive_min": (["0.7"], 0.7, "--pd-adaptive-temperature normkd"),
    "adaptive_max": (["3"], 3.0, "--pd-adaptive-temperature normkd"),
    "jsd_beta": (["0.2"], 0.2, "--pd-loss jsd"),
    "alpha": (["0.4"], 0.4, ""),
    "alpha_schedule": (["linear-increase"], "linear-increase", ""),
    "alpha_min": (["0.2"], 0.2, "--pd-alpha-schedule linear-decrease"),
    "alpha_warmup": (["0.2"], 0.2, "--pd-alpha-schedule wsd"),
    "alpha_decay": (["0.3"], 0.3, "--pd-alpha-schedule wsd"),
    "alpha_decay_style": (["linear"], "linear", "--pd-alpha-schedule wsd"),
    "alpha_period": (["0.25"], 0.25, "--pd-alpha-schedule period"),
    "recipe": (["vanilla"], "vanilla", ""),
    "loss_chunk_tokens": (["64"], 64, ""),
}


def test_every_option_is_tried():
    assert set(SETTINGS) == {option.name for option in fields(PDConfig)}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_flag_reaches_the_configuration(name, monkeypatch):
    values, expected, needs = SETTINGS[name]
    config = pd_config_from_args(parse(monkeypatch, *needs.split(), flag_of(name), *values))
    assert getattr(config, name) == expected
    assert getattr(PDConfig(), name) != expected


def test_no_flag_is_no_distillation(monkeypatch):
    assert pd_config_from_args(parse(monkeypatch)) is None
    assert pd_config_from_args(parse(monkeypatch, "--pd")) == PDConfig()


def test_help_names_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in fields(PDConfig):
        assert re.search(rf"{flag_of(option.name)}\b", shown)
        choices = ",".join(option.metadata["flag"].get("choices", ()))
        assert choices in shown
    assert "--tensor-model-parallel-size" in shown


# ------------------------------------------------------------------------------ recipes


def test_pd_star_is_the_papers(monkeypatch):
    args = parse(monkeypatch, "--pd-recipe", "pd-star")
    config = pd_config_from_args(args)
    assert (config.loss, config.tail, config.top_p, config.top_k) == (
        "kld",
        "renormalize",
        0.95,
        50,
    )
    assert (config.temperature, config.alpha, config.alpha_schedule) == (2.0, 0.9, "wsd")
    assert (args.lr_decay_style, args.lr_wsd_decay_style) == ("WSD", "cosine")
    assert (args.lr_warmup_fraction, args.lr_wsd_decay_iters) == (0.1, 10)
    assert "--pd-temperature 2.0" in args.pd_recipe_set
    assert "--lr-wsd-decay-iters 10" in args.pd_recipe_set


@pytest.mark.parametrize(("recipe", "top_k", "alpha"), [("vanilla", 100, 1.0), ("online", 50, 0.1)])
def test_recipes_with_a_cosine_learning_rate(recipe, top_k, alpha, monkeypatch):
    args = parse(monkeypatch, "--pd-recipe", recipe)
    config = pd_config_from_args(args)
    assert (config.loss, config.top_p, config.top_k) == ("nll", 0.95, top_k)
    assert (config.temperature, config.alpha, config.alpha_schedule) == (1.0, alpha, "constant")
    assert args.lr_decay_style == "cosine"


def test_a_recipe_changes_nothing_that_the_command_line_says(monkeypatch):
    args = parse(
        monkeypatch,
        *"--pd-recipe pd-star --pd-top-k 7 --pd-alpha=0.5 --lr-decay-style linear".split(),
    )
    config = pd_config_from_args(args)
    assert (config.top_k, config.alpha, config.top_p) == (7, 0.5, 0.95)
    assert args.lr_decay_style == "linear"
    assert args.lr_warmup_fraction is None
    assert not any(
        setting.startswith(("--pd-top-k", "--pd-alpha ", "--lr")) for setting in args.pd_recipe_set
    )


def test_robust_is_the_one_of_the_measurements(monkeypatch):
    args = parse(monkeypatch, "--pd-recipe", "robust")
    config = pd_config_from_args(args)
    assert (config.loss, config.tail, config.top_p, config.top_k) == ("kld", "to-label", 0.95, 50)
    assert (config.temperature, config.alpha, config.alpha_schedule) == (1.0, 0.9, "wsd")
    assert args.lr_decay_style == "WSD"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_valid_configuration(recipe, monkeypatch):
    assert pd_config_from_args(parse(monkeypatch, "--pd-recipe", recipe)).recipe == recipe


# ------------------------------------------------------------------------------ α over a run


def learning_rate(args: argparse.Namespace) -> LearningRate:
    # what Megatron's validation would make of these flags
    args.start_weight_decay = args.end_weight_decay = args.weight_decay
    args.min_lr = 0.0
    return learning_rate_of_flags(args)


def alphas(args: argparse.Namespace, *shares: float) -> list[float]:
    total = total_samples(args)
    schedule = resolve_schedule(pd_config_from_args(args), learning_rate(args), total)
    return [alpha_at(schedule, round(share * total), total) for share in shares]


def test_alpha_follows_the_learning_rates_phases(monkeypatch):
    wsd = "--pd-alpha 1.0 --pd-alpha-schedule wsd --lr-decay-style WSD".split()
    args = parse(
        monkeypatch,
        *wsd,
        *"--lr-warmup-iters 200 --lr-wsd-decay-iters 400 --lr-wsd-decay-style linear".split(),
    )
    assert alphas(args, 0, 0.1, 0.2, 0.6, 0.8, 1.0) == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    args = parse(
        monkeypatch,
        *wsd,
        *"--lr-warmup-fraction 0.2 --lr-decay-iters 500 --lr-wsd-decay-iters 100".split(),
        *"--lr-wsd-decay-style linear".split(),
    )
    # warmup is a share of --lr-decay-iters; all is over half way
    assert alphas(args, 0.05, 0.1, 0.4, 0.45, 0.5, 1.0) == pytest.approx([0.5, 1, 1, 0.5, 0, 0])


def test_alpha_follows_a_learning_rate_in_samples(monkeypatch):
    """What --train-iters 1000 at a batch of 8 has in iterations, --train-samples has in samples."""
    in_samples = "--train-samples 8000 --global-batch-size 8 --lr 1e-3".split()
    wsd = "--pd-alpha 1.0 --pd-alpha-schedule wsd --lr-decay-style WSD".split()
    wsd += "--lr-wsd-decay-style linear".split()
    args = parse(
        monkeypatch, *wsd, *"--lr-warmup-samples 1600 --lr-wsd-decay-samples 3200".split(),
        run=in_samples,
    )  # fmt: skip
    assert total_samples(args) == 8000
    assert alphas(args, 0, 0.1, 0.2, 0.6, 0.8, 1.0) == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    args = parse(
        monkeypatch,
        *wsd,
        *"--lr-warmup-fraction 0.2 --lr-decay-samples 4000 --lr-wsd-decay-samples 800".split(),
        run=in_samples,
    )
    assert alphas(args, 0.05, 0.1, 0.4, 0.45, 0.5, 1.0) == pytest.approx([0.5, 1, 1, 0.5, 0, 0])
    args = parse(monkeypatch, "--pd-recipe", "pd-star", run=in_samples)
    assert (args.lr_warmup_fraction, args.lr_wsd_decay_samples) == (0.1, 80)
    assert args.lr_wsd_decay_iters is None
    assert alphas(args, 0.05, 0.1, 0.99, 0.995, 1.0) == pytest.approx([0.45, 0.9, 0.9, 0.45, 0])


def test_alpha_has_its_own_phases_where_it_is_told(monkeypatch):
    args = parse(
        monkeypatch,
        *"--pd-alpha 1.0 --pd-alpha-schedule wsd --pd-alpha-warmup 800".split(),
        *"--pd-alpha-decay 0.5 --pd-alpha-decay-style linear".split(),
    )
    assert total_samples(args) == 8000
    assert alphas(args, 0.05, 0.1, 0.5, 0.75, 1.0) == pytest.approx([0.5, 1, 1, 0.5, 0])
    args = parse(monkeypatch, *"--pd-alpha 1.0 --pd-alpha-schedule wsd".split())
    assert alphas(args, 0.05, 0.1, 0.99, 0.995, 1.0) == pytest.approx([0.5, 1, 1, 0.5, 0])
    args = parse(
        monkeypatch, *"--pd-alpha 1.0 --pd-alpha-schedule period --pd-alpha-period 4000".split()
    )
    assert alphas(args, 0, 0.25, 0.5, 0.75) == pytest.approx([0, 1, 0, 1], abs=1e-12)


def test_a_curve_of_ones_own_gets_the_phases_that_it_names(monkeypatch):
    curve = AlphaCurve(lambda schedule, done: schedule.warmup, "level", phases=("warmup",))
    monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(curve=curve))
    flags = "--pd-alpha-schedule outside:curve --lr-decay-style WSD --lr-wsd-decay-iters 100"

    def schedule_of(*more: str) -> AlphaSchedule:
        args = parse(monkeypatch, *flags.split(), "--lr-warmup-iters", "400", *more)
        total = total_samples(args)
        return resolve_schedule(pd_config_from_args(args), learning_rate(args), total)

    assert schedule_of().phases == {"warmup": 0.4}
    assert schedule_of().decay == 0.0
    assert schedule_of("--pd-alpha-warmup", "0.3").phases == {"warmup": 0.3}


def test_a_run_or_decay_without_a_length_is_refused(monkeypatch):
    args = parse(monkeypatch, *"--pd-alpha-schedule wsd --lr-decay-style WSD".split())
    with pytest.raises(UserError, match="--lr-wsd-decay-iters"):
        learning_rate(args)
    args.train_iters = None
    with pytest.raises(UserError, match="--train-iters or --train-samples"):
        total_samples(args)

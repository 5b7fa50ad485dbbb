"""Every --pd-* flag from the command line of a two-process run, and the log and record of it."""

import itertools
import math
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from jobs import TRAINING, World, curves

from megatron_pd.distill.config import PDConfig, flag_of

ITERATIONS, BATCH = 4, 8
LENGTH = f"--train-iters {ITERATIONS} --lr-warmup-iters 1 --lr-wsd-decay-iters 1".split()
HALF_DOWN = 0.9 * (1 - math.sqrt(0.5))

# name: (flags, α of the four iterations, which start at 0, 1/4, 1/2 and 3/4 of the run)
CASES: dict[str, tuple[str, list[float]]] = {
    "nll raw": (
        "--pd-loss nll --pd-tail raw --pd-temperature 2 --pd-tau-squared --pd-top-p 0.8 "
        "--pd-top-k 5 --pd-alpha 0.7 --pd-alpha-schedule constant --pd-store {store}",
        [0.7, 0.7, 0.7, 0.7],
    ),
    "reverse-kld ghost": (
        "--pd-loss reverse-kld --pd-tail ghost --pd-student-temperature 1.5 "
        "--pd-alpha-schedule linear-increase --pd-alpha-min 0.1",
        [0.1, 0.3, 0.5, 0.7],
    ),
    "jsd to-label": (
        "--pd-loss jsd --pd-jsd-beta 0.3 --pd-tail to-label --pd-student-temperature 2 "
        "--pd-alpha-schedule linear-decrease",
        [0.9, 0.675, 0.45, 0.225],
    ),
    "mse-prob decoupled": (
        "--pd-loss mse-prob --pd-tail decoupled --pd-temperature 2 "
        "--pd-alpha-schedule period --pd-alpha-period 16 --pd-alpha-min 0.2",
        [0.2, 0.9, 0.2, 0.9],
    ),
    "mse-logit": (
        "--pd-loss mse-logit --pd-alpha-schedule wsd --pd-alpha-warmup 8 --pd-alpha-decay 0.5 "
        "--pd-alpha-decay-style minus_sqrt",
        [0.0, 0.9, 0.9, HALF_DOWN],
    ),
    "kld sampled": (
        "--pd-loss kld --pd-tail sampled --pd-store {sampled} --pd-alpha-schedule wsd "
        "--pd-alpha-warmup 16 --pd-alpha-decay-style linear",
        [0.0, 0.45, 0.9, 0.9],
    ),
    "normkd": (
        "--pd-adaptive-temperature normkd --pd-adaptive-min 0.8 --pd-adaptive-max 3 "
        "--pd-tail renormalize --pd-alpha-schedule wsd --pd-alpha-decay 16 "
        "--pd-alpha-decay-style cosine",
        [0.0, 0.9, 0.9, 0.45],
    ),
    "wttm": (
        "--pd-adaptive-temperature wttm --pd-temperature 2 --pd-alpha-schedule wsd "
        "--pd-alpha-decay 16 --pd-alpha-decay-style exponential",
        [0.0, 0.9, 0.9, 0.9 * (math.sqrt(2) - 1)],
    ),
    "adakd-sd": (
        "--pd-adaptive-temperature adakd-sd --pd-adaptive-slope 0.8 --pd-loss-chunk-tokens 16",
        [0.9] * 4,
    ),
    "adakd-h": ("--pd-adaptive-temperature adakd-h", [0.9] * 4),
    # the test runs' own learning rate, which wins over a recipe's: 1 iteration up, 1 down
    "pd-star": ("--pd-recipe pd-star", [0.0, 0.9, 0.9, 0.9]),
    "vanilla": ("--pd-recipe vanilla", [1.0] * 4),
    "online": ("--pd-recipe online", [0.1] * 4),
    "robust": ("--pd-recipe robust", [0.0, 0.9, 0.9, 0.9]),
}


def test_every_option_and_every_choice_is_in_a_case() -> None:
    words = " ".join(flags for flags, _ in CASES.values()).split()
    for option in fields(PDConfig):
        flag = flag_of(option.name)
        assert flag in words
        for choice in option.metadata["flag"].get("choices", ()):
            assert any(pair == (flag, choice) for pair in itertools.pairwise(words)), (
                flag,
                choice,
            )


@pytest.fixture(scope="module")
def default_kd_loss(world: World) -> np.ndarray:
    return world.train(*world.from_student(), *LENGTH, "--pd", ranks=2)["kd loss"]


@pytest.mark.parametrize("case", CASES)
def test_option(case: str, world: World, sampled_store: Path, default_kd_loss: np.ndarray) -> None:
    flags, alphas = CASES[case]
    flags = flags.format(store=f"{world.corpus}.pd", sampled=sampled_store)
    events = world.folder / f"option-{case.replace(' ', '-')}"
    argv = world.training_flags(
        *("--tensorboard-dir", events), *world.from_student(), *LENGTH, *flags.split()
    )
    log = world.runner.check("megatron_pd.pretrain", argv, ranks=2)
    found = curves(events)
    np.testing.assert_allclose(found["alpha"], alphas, atol=1e-6)
    assert np.isfinite(found["kd loss"]).all() and (found["kd loss"] > 0).all()
    assert np.isfinite(found["grad-norm"]).all()
    assert abs(found["kd loss"][0] - default_kd_loss[0]) > 1e-4
    for setting in flags.split("--")[1:]:
        assert log.count(f"\n  --{' '.join(setting.split())}") == 1, setting
    if "--pd-recipe" in flags:
        assert f"{flags} set --pd-loss" in log
    cuts_nothing = f"{world.corpus}.pd was dumped with --dump-top-k 50, so --pd-top-k 100 cuts"
    assert (cuts_nothing in log) == (case == "vanilla")


def test_chunks_change_nothing(world: World, default_kd_loss: np.ndarray) -> None:
    found = world.train(*world.from_student(), *LENGTH, "--pd-loss-chunk-tokens", 16, ranks=2)
    np.testing.assert_allclose(found["kd loss"], default_kd_loss, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_megatrons_timers_tell_what_the_rows_cost(workers: int, world: World) -> None:
    flags = ("--pd", "--num-workers", workers, "--timing-log-level", 2)
    argv = world.training_flags(*world.from_student(), *LENGTH, *flags)
    log = world.runner.check("megatron_pd.pretrain", argv, ranks=2)

    def milliseconds(timer: str) -> list[float]:
        return [float(most) for most in re.findall(rf"{timer} \.+: \([\d.]+, ([\d.]+)\)", log)]

    rows, fetching = milliseconds("teacher-rows"), milliseconds("batch-generator")
    assert len(rows) == len(fetching) == ITERATIONS
    for of_rows, of_all in zip(rows, fetching, strict=True):
        assert 0 < of_rows < of_all


def test_micro_batches_with_rows_are_fetched_ahead(world: World) -> None:
    for flags, micro_batches in ((["--pd"], 2 * ITERATIONS), ([], 0)):
        argv = world.training_flags(*world.from_student(), *LENGTH, *flags)
        log = world.runner.check("prefetch_job", argv, ranks=2)
        assert log.count(f"fetched ahead: {micro_batches} micro-batches") == 2


def test_a_resumed_run_says_what_changed(world: World) -> None:
    checkpoint = world.folder / "changing"
    saving = ("--save", checkpoint, "--save-interval", 2)

    def log_of(*flags) -> str:
        argv = world.training_flags(*LENGTH, *flags)
        return world.runner.check("megatron_pd.pretrain", argv, ranks=2)

    first = log_of(
        *world.from_student(),
        "--pd-alpha-schedule",
        "linear-increase",
        *saving,
        *("--exit-interval", 2),
    )
    assert "differs" not in first
    same = log_of("--load", checkpoint, "--pd-alpha-schedule", "linear-increase")
    assert "differs" not in same
    changed = log_of("--load", checkpoint, "--pd-tail", "ghost", "--pd-top-k", 12)
    differences = changed[changed.index("distillation differs") :].splitlines()[:6]
    assert str(checkpoint) in differences[0]
    assert differences[1:5] == [
        "  --pd-tail was renormalize and is now ghost.",
        "  --pd-top-k was unset and is now 12.",
        "  --pd-alpha-schedule was linear-increase and is now constant.",
        "  --pd-alpha-min was 0.0 and is now unset.",
    ]
    assert not differences[5].startswith("  ")
    off = log_of("--load", checkpoint)
    assert "Distillation was on and is now off." in off


def test_batch_size_ramp_up_moves_alpha_by_samples(world: World) -> None:
    """4 iterations of 4 samples, then (after 1024 tokens) 4 of 8: α rises with the samples."""
    per_iteration = ("--global-batch-size", "--train-iters", "--lr-warmup-iters")
    training = list(TRAINING)
    for flag in (*per_iteration, "--lr-wsd-decay-iters"):
        index = training.index(flag)
        del training[index : index + 2]
    events = world.folder / "ramp-up"
    argv = [
        *world.architecture,
        *training,
        *world.from_student(),
        *("--data-path", str(world.corpus), "--tensorboard-dir", str(events)),
        *("--train-samples", "48", "--step-batch-size-schedule", "0:4 1024:8"),
        *("--lr-warmup-samples", "8", "--lr-wsd-decay-samples", "8"),
        *("--pd-alpha", "0.6", "--pd-alpha-schedule", "linear-increase"),
    ]
    world.runner.check("megatron_pd.pretrain", argv)
    found = curves(events)["alpha"]
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], atol=1e-6)

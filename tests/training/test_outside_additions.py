"""A loss, a tail policy and an α schedule from outside the package, named on the command line."""

from pathlib import Path

import numpy as np
import pytest
from jobs import World
from test_bad_input import assert_refused

MODULE = "outside_additions"


def train(world: World, *flags: str, ranks: int = 1) -> dict[str, np.ndarray]:
    layout = ("--tensor-model-parallel-size", ranks)
    return world.train(*world.from_student(), *layout, *flags, ranks=ranks)


def assert_same_run(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """To float32's rounding in the first step, which the optimizer's steps then let grow."""
    np.testing.assert_allclose(found["kd loss"][0], expected["kd loss"][0], rtol=1e-5)
    for name in ("lm loss", "kd loss", "alpha", "grad-norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def outside_loss(world: World) -> dict[str, np.ndarray]:
    return train(world, "--pd-loss", f"{MODULE}:my_kld", "--pd-tail", "ghost", ranks=2)


def test_a_loss_trains_at_tp2_as_the_fused_one(
    world: World, outside_loss: dict[str, np.ndarray]
) -> None:
    assert_same_run(outside_loss, train(world, "--pd-loss", "kld", "--pd-tail", "ghost", ranks=2))


def test_a_loss_trains_the_same_on_one_rank(
    world: World, outside_loss: dict[str, np.ndarray]
) -> None:
    flags = ("--pd-loss", f"{MODULE}:my_kld", "--pd-tail", "ghost")
    assert_same_run(outside_loss, train(world, *flags))


def test_a_tail_policy_trains_at_tp2(world: World) -> None:
    """Half of the teacher's measure is half of its loss, where that is linear in it: nll."""
    nll = ("--pd-loss", "nll", "--pd-alpha", "1.0", "--train-iters", "3")
    mine = (*nll, "--pd-tail", f"{MODULE}:my_tail")
    found = train(world, *mine, ranks=2)
    whole = train(world, *nll, "--pd-tail", "raw", ranks=2)
    np.testing.assert_allclose(found["kd loss"][0], whole["kd loss"][0] / 2, rtol=1e-5)
    assert_same_run(found, train(world, *mine))


def test_a_tail_policy_of_draws_reads_a_store_of_draws(world: World, sampled_store: Path) -> None:
    nll = ("--pd-loss", "nll", "--pd-alpha", "1.0", "--train-iters", "3")
    mine = (*nll, "--pd-tail", f"{MODULE}:my_draws")
    found = train(world, *mine, "--pd-store", str(sampled_store))
    whole = train(world, *nll, "--pd-tail", "sampled", "--pd-store", str(sampled_store))
    np.testing.assert_allclose(found["kd loss"][0], whole["kd loss"][0] / 2, rtol=1e-5)
    refused = world.runner.run("megatron_pd.pretrain", world.training_flags(*mine))
    assert_refused(refused, f"--pd-tail {MODULE}:my_draws", "--dump-sampled")


def test_a_resumed_run_compares_the_name(world: World) -> None:
    checkpoint = world.folder / "outside"
    mine = ("--pd-loss", f"{MODULE}:my_kld")

    def log_of(*flags: object) -> str:
        return world.runner.check("megatron_pd.pretrain", world.training_flags(*flags))

    saving = ("--save", checkpoint, "--save-interval", 2, "--exit-interval", 2)
    assert f"\n  --pd-loss {MODULE}:my_kld\n" in log_of(*world.from_student(), *mine, *saving)
    assert "differs" not in log_of("--load", checkpoint, *mine)
    other = log_of("--load", checkpoint, "--pd-loss", "kld")
    assert f"  --pd-loss was {MODULE}:my_kld and is now kld." in other


def test_an_alpha_schedule_sets_alpha(world: World) -> None:
    flags = ("--pd-alpha", "0.8", "--pd-alpha-schedule", f"{MODULE}:my_curve")
    found = train(world, *flags, "--train-iters", "4")
    np.testing.assert_allclose(found["alpha"], 0.8 * (np.arange(4) / 4) ** 2, atol=1e-6)


def test_what_cannot_be_found_is_one_sentence(world: World) -> None:
    for flags, words in (
        (["--pd-loss", "cosine"], ("--pd-loss is 'cosine'", "mse-logit, or your own as package")),
        (["--pd-loss", f"{MODULE}:no_such"], ("--pd-loss: ", "no_such", "PYTHONPATH")),
        (["--pd-tail", "no_such_module:tail"], ("--pd-tail: ", "no_such_module", "PYTHONPATH")),
        (["--pd-loss", f"{MODULE}:my_tail"], ("--pd-loss: ", "TailPolicy", "no loss")),
        (["--pd-tail", f"{MODULE}:my_tail", "--pd-jsd-beta", "0.5"], ("--pd-jsd-beta",)),
    ):
        outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
        assert_refused(outcome, *words)
        assert "usage:" not in outcome.log

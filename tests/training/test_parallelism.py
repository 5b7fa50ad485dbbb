"""One PD run, the same curves in every parallel layout, and after a stop and a resumption."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import LAYOUTS, PD_STAR, World, curves, write_corpus
from megatron.core.datasets.indexed_dataset import IndexedDataset

CURVES = ("lm loss", "kd loss", "alpha", "grad-norm")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_same_curves_in_every_layout(
    layout: str, layout_curves: dict[str, dict[str, np.ndarray]]
) -> None:
    expected, found = layout_curves["tp1"], layout_curves[layout]
    for tag in CURVES:
        assert len(expected[tag]) == 6
        np.testing.assert_allclose(found[tag], expected[tag], rtol=0, atol=1e-4, err_msg=tag)
    assert found["alpha"].max() == pytest.approx(0.9)
    assert 0.5 < found["teacher tokens"].mean() < 1


def test_alpha_zero_is_megatrons_lm_loss(world: World) -> None:
    plain = world.train(*world.from_student())
    distilled = world.train(*world.from_student(), "--pd-alpha", 0)
    assert "kd loss" not in plain and (distilled["kd loss"] > 0).all()
    for tag in ("lm loss", "grad-norm"):
        np.testing.assert_allclose(distilled[tag], plain[tag], rtol=0, atol=1e-5, err_msg=tag)


@pytest.mark.parametrize("layout", ["tp1", "tp2pp2"])
def test_lm_only_by_our_kernels_is_megatrons_lm_loss(layout: str, world: World) -> None:
    """Without a store; whole and in chunks; validation too."""
    ranks, layout_flags = LAYOUTS[layout]
    flags = [*world.from_student(), *layout_flags, "--split", "90,10,0", "--eval-iters", 2]
    flags += ["--eval-interval", 3, "--train-iters", 3, "--lr-wsd-decay-iters", 1]
    ours = ["--pd-lm-only", "--pd-loss-chunk-tokens", 48]
    expected = world.train(*flags, ranks=ranks)
    for more in (ours[:1], ours):
        found = world.train(*flags, *more, ranks=ranks)
        assert "kd loss" not in found
        for tag in ("lm loss", "lm loss validation", "grad-norm"):
            np.testing.assert_allclose(found[tag], expected[tag], rtol=2e-6, err_msg=tag)


def test_tied_embeddings_and_chunks_change_nothing(world: World) -> None:
    """The embedding's weight gets gradients from both ends, at the output chunk by chunk."""
    tied = [flag for flag in world.training_flags() if "untie" not in flag]
    start = world.folder / "tied"
    world.curves_of([*tied, "--train-iters", "3", "--save", str(start), "--save-interval", "3"])
    tied += [*PD_STAR, "--load", str(start), "--finetune", "--no-load-optim", "--no-load-rng"]
    chunked = [*tied, "--pd-loss-chunk-tokens", "24"]
    expected = world.curves_of(tied)
    overlap = [*LAYOUTS["dp2"][1], "--overlap-grad-reduce", "--calculate-per-token-loss"]
    for ranks, flags in (*(LAYOUTS[name] for name in ("tp2", "pp2 interleaved")), (2, overlap)):
        found = world.curves_of([*chunked, *flags], ranks)
        for tag in CURVES:
            np.testing.assert_allclose(found[tag], expected[tag], rtol=0, atol=1e-4, err_msg=tag)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16 --initial-loss-scale 65536"])
def test_chunks_in_16_bits_change_nothing(precision: str, world: World) -> None:
    flags = [*world.from_student(), *PD_STAR, *precision.split(), "--train-iters", 3]
    flags += ["--lr-wsd-decay-iters", 1, "--lr-warmup-iters", 1]
    whole, chunked = (world.train(*flags, *more) for more in ((), ("--pd-loss-chunk-tokens", 24)))
    for tag in CURVES:
        assert len(whole[tag]) == 3
        np.testing.assert_allclose(chunked[tag], whole[tag], rtol=5e-3, err_msg=tag)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_resumed_run_has_the_curve_of_one_that_went_on(
    layout: str, world: World, layout_curves: dict[str, dict[str, np.ndarray]]
) -> None:
    ranks, flags = LAYOUTS[layout]
    checkpoint = world.folder / f"stopped-{layout}"
    saving = ("--save", checkpoint, "--save-interval", 3)
    first = world.train(
        *world.from_student(), *PD_STAR, *flags, *saving, "--exit-interval", 3, ranks=ranks
    )
    second = world.train("--load", checkpoint, *PD_STAR, *flags, ranks=ranks)
    for tag in CURVES:
        assert len(first[tag]) == 3
        np.testing.assert_allclose(
            np.concatenate([first[tag], second[tag]]),
            layout_curves[layout][tag],
            rtol=0,
            atol=1e-5,
            err_msg=tag,
        )


RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@pytest.fixture(scope="module")
def stopped_at_tp2(world: World) -> Path:
    """A checkpoint after three iterations with two tensor-parallel ranks."""
    checkpoint = world.folder / "reshardable-tp2"
    ranks, flags = LAYOUTS["tp2"]
    saving = ("--save", checkpoint, "--save-interval", 3, "--exit-interval", 3)
    world.train(*world.from_student(), *PD_STAR, *flags, *RESHARDABLE, *saving, ranks=ranks)
    return checkpoint


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_resumed_run_in_another_layout_has_the_curve_of_one_that_went_on(
    layout: str, world: World, stopped_at_tp2: Path, layout_curves: dict[str, dict[str, np.ndarray]]
) -> None:
    """Tensor, pipeline and data parallelism change, and the distributed optimizer goes on."""
    ranks, flags = LAYOUTS[layout]
    found = world.train("--load", stopped_at_tp2, *PD_STAR, *flags, *RESHARDABLE, ranks=ranks)
    for tag in CURVES:
        assert len(found[tag]) == 3
        np.testing.assert_allclose(
            found[tag], layout_curves["tp1"][tag][3:], rtol=0, atol=1e-4, err_msg=tag
        )


def test_resumed_run_of_the_torch_format_has_the_curve_of_one_that_went_on(world: World) -> None:
    checkpoint = world.folder / "torch-format"
    ranks, flags = LAYOUTS["dp2"]
    flags = [*PD_STAR, *flags, "--ckpt-format", "torch"]
    whole = world.train(*flags, "--save", checkpoint, "--save-interval", 3, ranks=ranks)
    # Megatron's --ckpt-step does not reach the optimizer's file of this format.
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = world.train("--load", checkpoint, *flags, ranks=ranks)
    for tag in CURVES:
        np.testing.assert_allclose(resumed[tag], whole[tag][3:], rtol=0, atol=1e-5, err_msg=tag)


def test_alpha_goes_by_the_learning_rate_that_a_checkpoint_has(world: World) -> None:
    checkpoint = world.folder / "phases"
    length = ("--train-iters", 8, "--min-lr", 0)
    saving = ("--save", checkpoint, "--save-interval", 2, "--exit-interval", 2)
    phases = ("--lr-warmup-iters", 4, "--lr-wsd-decay-iters", 1)
    world.train(*world.from_student(), *PD_STAR, *length, *phases, *saving)

    resuming = ("--load", checkpoint, *PD_STAR, *length, "--use-checkpoint-opt-param-scheduler")
    others = ("--lr-warmup-iters", 1, "--lr-decay-iters", 6, "--lr-wsd-decay-iters", 2)
    events = world.folder / "phases-events"
    argv = world.training_flags(*resuming, *others, "--tensorboard-dir", events)
    log = world.runner.check("megatron_pd.pretrain", argv)
    found = curves(events)
    # Up over the checkpoint's 4 iterations, and down over its 8 but with the flags' 2: Megatron
    # has no length of the decay in checkpoints. The log has the learning rate of the next step.
    np.testing.assert_allclose(found["learning-rate"] / 5e-3, [0.75, 1, 1, 1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(found["alpha"] / 0.9, [0.5, 0.75, 1, 1, 1, 0.5], atol=1e-6)
    assert "α follows the learning rate that the checkpoint has" in log
    differs = log[log.index("distillation differs") :].splitlines()[1:3]
    assert differs[0] == "  α: decay was 0.125 and is now 0.25."
    assert not differs[1].startswith("  ")

    argv = world.training_flags(*resuming, "--lr-decay-style", "linear")
    decay = argv.index("--lr-wsd-decay-iters")
    outcome = world.runner.run("megatron_pd.pretrain", argv[:decay] + argv[decay + 2 :])
    assert outcome.statuses == [2] and "give --lr-wsd-decay-iters" in outcome.log


@pytest.fixture(scope="module")
def uneven(world: World, teacher: Path) -> World:
    """A corpus, dumped, a third of which is end-of-document tokens: whole samples without loss."""
    documents = IndexedDataset(str(world.corpus))
    lengths = documents.sequence_lengths
    end = documents[0][-1]
    corpus = world.folder / "uneven"
    ends = [np.full(200, end) for _ in range(int(lengths.sum()) // 400)]
    write_corpus(corpus, [documents[index] for index in range(len(documents))] + ends)
    uneven = replace(world, corpus=corpus)
    uneven.dump(teacher)
    return uneven


def test_one_mean_over_all_tokens(uneven: World) -> None:
    """Micro-batches of one sample each, with masks of very unequal size, against one of all."""
    flags = [*uneven.from_student(), *PD_STAR, "--eod-mask-loss", "--train-iters", 3]
    flags += ["--lr-wsd-decay-iters", 1, "--lr-warmup-iters", 1]
    dense = uneven.train(*flags, "--micro-batch-size", 8)
    ones = [*flags, "--micro-batch-size", 1]
    for ranks in (1, 2):
        found = uneven.train(*ones, "--calculate-per-token-loss", ranks=ranks)
        for tag in CURVES:
            np.testing.assert_allclose(found[tag], dense[tag], rtol=1e-4, atol=1e-5, err_msg=tag)
    # Megatron's default weighs the tokens of a sample with few of them more.
    default = uneven.train(*ones)
    assert (abs(default["grad-norm"] / dense["grad-norm"] - 1) > 0.02).all()

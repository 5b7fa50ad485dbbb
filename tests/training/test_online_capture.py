"""A teacher's rows, kept while it is trained: it is trained as ever, and they are the model's."""

from pathlib import Path

import numpy as np
import pytest
from jobs import LAYOUTS, VOCAB_SIZE, World, write_corpus
from test_dump import assert_same_entries, rows_of

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.store import LogitStore

LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("tp1", "tp2pp2", "pp2 interleaved", "dp2")},
}
CURVES = ("lm loss", "grad-norm")
EXACT = ("--pd-capture-codec", "exact", "--pd-capture-statistics")


def store_in(folder: Path) -> Path:
    return folder / "corpus.pd"


@pytest.fixture(scope="module")
def captured(world: World) -> Path:
    """What a run of one rank captures."""
    folder = world.folder / "captured tp1"
    world.train(*world.from_student(), "--pd-capture", folder, *EXACT)
    return store_in(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_and_so_are_the_rows(
    world: World, captured: Path, layout: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    folder = world.folder / f"captured in {layout}"
    flags = [*world.from_student(), *flags]
    plain = world.train(*flags, ranks=ranks)
    with_capture = world.train(*flags, "--pd-capture", folder, *EXACT, ranks=ranks)
    for tag in CURVES:
        np.testing.assert_array_equal(with_capture[tag], plain[tag], err_msg=tag)
    taught = 0
    for found, expected in zip(rows_of(store_in(folder)), rows_of(captured), strict=True):
        np.testing.assert_array_equal(found[2], expected[2])
        assert_same_entries(found, expected, logprob_tolerance=1e-4)
        taught += int((found[2] > 0).sum())
    assert taught > 1000


@pytest.mark.parametrize("layout", ["tp1", "tp2pp2", "dp2"])
def test_rows_are_those_of_a_packed_dump(world: World, layout: str) -> None:
    """With a learning rate of 0 all iterations have the weights that were loaded."""
    ranks, flags = LAYOUTS[layout]
    folder, path = world.folder / f"still {layout}", world.folder / f"packed {layout}.pd"
    world.train(
        *world.from_student(),
        *flags,
        "--pd-capture",
        folder,
        *EXACT,
        "--lr",
        0,
        "--min-lr",
        0,
        ranks=ranks,
    )
    packed = ("--dump-context", "packed", "--dump-samples", 48, "--split", "100,0,0")
    world.dump(
        world.student,
        *packed,
        "--dump-codec",
        "exact",
        "--dump-statistics",
        "--dump-store",
        path,
        *flags,
        ranks=ranks,
    )
    assert not Path(f"{path}.samples").exists()
    for found, expected in zip(rows_of(store_in(folder)), rows_of(path), strict=True):
        np.testing.assert_array_equal(found[2], expected[2])
        assert_same_entries(found, expected, logprob_tolerance=1e-5)
        np.testing.assert_allclose(found[3], expected[3], atol=1e-5)


@pytest.mark.parametrize("layout", ["tp1", "dp2"])
def test_a_run_that_was_stopped_captures_the_same(
    world: World, captured: Path, layout: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    folder, checkpoint = world.folder / f"resumed {layout}", world.folder / f"captured-{layout}"
    flags = [*flags, "--pd-capture", folder, *EXACT, "--save", checkpoint, "--save-interval", 3]
    argv = world.training_flags(*world.from_student(), *flags, "--exit-interval", 3)
    log = world.runner.check("megatron_pd.pretrain", argv, ranks)
    assert "`megatron-pd collect" in log and not store_in(folder).exists()
    world.train("--load", checkpoint, *flags, ranks=ranks)
    assert_same_rows(store_in(folder), captured)
    assert LogitStore(store_in(folder)).metadata["iterations"] == [1, 6]


def test_a_killed_run_loses_no_row_of_its_checkpoint(world: World, captured: Path) -> None:
    folder, checkpoint = world.folder / "captured and killed", world.folder / "captured-killed"
    flags = ["--pd-capture", folder, *EXACT, "--save", checkpoint, "--save-interval", 2]
    argv = world.training_flags(*world.from_student(), *flags)
    saved = checkpoint / "latest_checkpointed_iteration.txt"
    killed = world.runner.run("megatron_pd.pretrain", argv, kill_when=saved)
    assert killed.statuses != [0]
    world.train("--load", checkpoint, *flags)
    assert_same_rows(store_in(folder), captured)


def assert_same_rows(path: Path, expected: Path) -> None:
    for found, there in zip(rows_of(path), rows_of(expected), strict=True):
        np.testing.assert_array_equal(found[2], there[2])
        assert_same_entries(found, there)


def test_several_epochs_of_a_blend(world: World) -> None:
    """Of a token that is read several times, the store has the last row: with the weights still,
    that of a packed dump, in which it is the last sample's."""
    rng = np.random.default_rng()
    prefixes = [world.folder / f"blended-{name}" for name in "ab"]
    for prefix, documents in zip(prefixes, (9, 30), strict=True):
        lengths = rng.integers(1, 150, documents)
        write_corpus(prefix, [rng.integers(0, VOCAB_SIZE, n).astype(np.uint16) for n in lengths])
    blend = ["--data-path", "0.3", *prefixes[:1], "0.7", *prefixes[1:]]
    folder = world.folder / "captured blend"
    flags = [*world.from_student(), "--lr", 0, "--min-lr", 0, "--pd-capture", folder, *EXACT]
    world.train(*blend, *flags, "--train-iters", 20)
    packed = ("--dump-context", "packed", "--dump-samples", 160, "--split", "100,0,0")
    argv = world.dump_flags(world.student, *packed, "--dump-codec", "exact", *blend)
    killed = world.runner.run(
        "megatron_pd.teacher.megatron", argv, kill_when=f"{prefixes[0]}.pd.samples"
    )
    assert killed.statuses != [0]
    world.runner.check("megatron_pd.teacher.megatron", argv)
    for prefix in prefixes:
        path = folder / f"{prefix.name}.pd"
        assert_same_rows(path, Path(f"{prefix}.pd"))
        LogitStore(path).check_corpus(MegatronCorpus(str(prefix)), full=True)
        assert sum((rows[2] > 0).sum() for rows in rows_of(path)) > 200
    world.runner.check("megatron_pd.teacher.megatron", argv)  # nothing left to do
    other = world.runner.run("megatron_pd.teacher.megatron", [*argv, "--dump-top-k", "3"])
    assert other.statuses == [1] and "top_k 50, now 3" in other.log

    taught = world.train(
        *blend,
        *world.from_student(),
        "--pd-recipe",
        "online",
        "--pd-store",
        *(folder / f"{prefix.name}.pd" for prefix in prefixes),
    )
    assert (taught["kd loss"] > 0).all() and taught["teacher tokens"].min() > 0.5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pd-capture-top-k", "5"], "no --pd-capture"),
        (["--pd-capture", "x", "--pd-alpha", "0.5"], "train a student: do one of the two"),
        (["--pd-capture", "x", "--pd-capture-top-p", "1.5"], "--pd-capture-top-p is 1.5"),
        (
            ["--pd-capture", "x", "--pd-capture-from", "5", "--pd-capture-until", "4"],
            "isn't before",
        ),
        (["--pd-capture", "x", "--pd-capture-from", "7"], "--train-iters 6"),
    ],
)
def test_refused(world: World, flags: list[str], sentence: str) -> None:
    flags = [str(world.folder / "refused") if flag == "x" else flag for flag in flags]
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
    assert outcome.statuses == [2] and sentence in outcome.log
    assert "Traceback" not in outcome.log and not (world.folder / "refused").exists()


def test_only_some_iterations(world: World, captured: Path) -> None:
    folder = world.folder / "captured in part"
    part = ("--pd-capture-from", 3, "--pd-capture-until", 4)
    world.train(*world.from_student(), "--pd-capture", folder, *EXACT, *part)
    store = LogitStore(store_in(folder))
    assert store.metadata["iterations"] == [3, 4]
    there = 0
    for found, expected in zip(rows_of(store_in(folder)), rows_of(captured), strict=True):
        own = found[2] > 0
        np.testing.assert_array_equal(found[2][own], expected[2][own])
        there += own.sum()
    assert 0 < there <= 2 * 8 * 64


def test_rows_of_another_run_are_refused(world: World, captured: Path) -> None:
    folder = captured.parent
    flags = [*world.from_student(), "--pd-capture", folder, "--pd-capture-codec", "exact"]
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
    assert outcome.statuses == [1] and "begun with row_statistics" in outcome.log
    world.runner.check("megatron_pd.cli", ["collect", folder])  # all is there already

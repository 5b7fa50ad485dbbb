"""The teacher's rows do not depend on how the teacher was split, and a killed dump goes on."""

import re
from pathlib import Path

import numpy as np
import pytest
from jobs import VOCAB_SIZE, World
from uneven_replicas_job import SHARDS

from megatron_pd.store import LogitStore, StoreError

# The padded vocabulary of 384 divides by 2 ranks: the second holds all the padding.
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
}


def rows_of(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    store = LogitStore(path)
    documents = [store.read(document) for document in range(store.num_documents)]
    return [(d.ids, d.logprobs, d.counts, d.statistics["label_logprob"]) for d in documents]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_same_in_every_layout(world: World, teacher: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    path = world.folder / f"{layout}.pd"
    world.dump(teacher, "--dump-store", path, "--dump-codec", "exact", *flags, ranks=ranks)
    for found, expected in zip(rows_of(path), rows_of(Path(f"{world.corpus}.pd")), strict=True):
        np.testing.assert_array_equal(found[2], expected[2])
        assert_same_entries(found, expected)
        np.testing.assert_allclose(found[3], expected[3], atol=1e-5)


def assert_same_entries(found, expected, logprob_tolerance: float = 1e-5) -> None:
    """Equal ids with equal log-probs; ids whose log-probs differ by rounding may change places."""
    by_id = [np.argsort(rows[0], axis=1, kind="stable") for rows in (found, expected)]
    for index, tolerance in ((0, 0.0), (1, logprob_tolerance)):
        a, b = (
            np.take_along_axis(rows[index], order, axis=1)
            for rows, order in zip((found, expected), by_id, strict=True)
        )
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_rows_are_nuclei_of_full_vocabulary_probabilities(world: World) -> None:
    for ids, logprobs, counts, label_logprob in rows_of(Path(f"{world.corpus}.pd")):
        assert counts[-1] == 0 and (counts[:-1] >= 1).all() and counts.max() <= 50
        mask = np.arange(ids.shape[1]) < counts[:, None]
        probabilities = np.where(mask, np.exp(logprobs.astype(np.float64)), 0)
        mass = probabilities.sum(1)[:-1]
        assert (mass <= 1 + 1e-5).all()
        # The row is the smallest that reaches 0.95, or the top 50.
        last = probabilities[np.arange(len(counts) - 1), counts[:-1] - 1]
        assert ((mass >= 0.95 - 1e-5) | (counts[:-1] == 50)).all()
        assert (mass - last < 0.95 + 1e-5).all()
        assert (label_logprob[:-1] <= 0).all()


def test_killed_dump_goes_on_where_it_was(world: World, teacher: Path) -> None:
    path = world.folder / "killed.pd"
    flags = world.dump_flags(teacher, "--dump-store", path)
    killed = world.runner.run("megatron_pd.teacher.megatron", flags, kill_when=path)
    assert killed.statuses != [0]
    with pytest.raises(StoreError):
        LogitStore(path)
    world.runner.check("megatron_pd.teacher.megatron", flags)
    for found, expected in zip(rows_of(path), rows_of(Path(f"{world.corpus}.pd")), strict=True):
        assert_same_entries(found, expected, logprob_tolerance=0.2)  # the compact codec's


def test_a_fast_replica_takes_the_shards_that_a_slow_one_leaves(
    world: World, teacher: Path
) -> None:
    path = world.folder / "two-paces.pd"
    flags = world.dump_flags(teacher, "--dump-store", path, "--dump-codec", "exact")
    log = world.runner.check("uneven_replicas_job", flags, ranks=2)
    fast, slow = (int(n) for n in re.findall(r"replica of rank \d: (\d+) batches", log))
    assert fast + slow >= SHARDS and fast > 2 * slow > 0
    assert len(list(path.glob("*.shard"))) == SHARDS
    for found, expected in zip(rows_of(path), rows_of(Path(f"{world.corpus}.pd")), strict=True):
        assert_same_entries(found, expected)


def test_help_names_the_flags(bare_world: World) -> None:
    log = bare_world.runner.check("megatron_pd.teacher.megatron", ["--help"])
    assert "--dump-top-p" in log and "--tensor-model-parallel-size" in log


def test_random_draws_are_unbiased_and_the_same_in_another_layout(
    world: World, teacher: Path, sampled_store: Path
) -> None:
    """The share of draws of each token that the top-p-k store holds against its probability."""
    draws = LogitStore(sampled_store).draws
    assert draws == 20
    excess, variance = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE)
    for sampled, top in zip(
        rows_of(sampled_store), rows_of(Path(f"{world.corpus}.pd")), strict=True
    ):
        share, _ = dense(sampled)
        probability, is_kept = dense(top)
        np.testing.assert_array_equal(sampled[2] > 0, top[2] > 0)
        np.testing.assert_allclose(share.sum(1)[:-1], 1, atol=1e-5)
        np.testing.assert_allclose(share * draws, np.round(share * draws), atol=1e-4)
        # The default codec keeps this column in half precision.
        np.testing.assert_allclose(sampled[3], top[3], atol=0.01)
        excess += np.where(is_kept, share - probability, 0).sum(0)
        variance += (probability * (1 - probability)).sum(0) / draws
    assert (variance > 0).sum() > 50
    assert (np.abs(excess) < 6 * np.sqrt(variance) + 1e-6).all()

    path = world.folder / "sampled-tp2.pd"
    flags = ("--dump-sampled", draws, "--dump-store", path, "--tensor-model-parallel-size", 2)
    world.dump(teacher, *flags, ranks=2)
    same = [
        (dense(one)[0] == dense(other)[0]).all(1)
        for one, other in zip(rows_of(path), rows_of(sampled_store), strict=True)
    ]
    # Rounding may move a draw that falls on a boundary between two tokens.
    assert np.concatenate(same).mean() > 0.999


def dense(rows) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, V] of the row's entries, and where it has one."""
    ids, logprobs, counts, _ = rows
    mask = np.arange(ids.shape[1]) < counts[:, None]
    probability, entry = np.zeros((2, len(ids), VOCAB_SIZE))
    row, column = np.nonzero(mask)
    probability[row, ids[row, column]] = np.exp(logprobs[row, column].astype(np.float64))
    entry[row, ids[row, column]] = 1
    return probability, entry > 0

"""The teacher's rows do not depend on how the teacher was split, and a killed dump goes on."""

from pathlib import Path

import numpy as np
import pytest
from jobs import World

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
    return [(d.ids, d.logprobs, d.counts, d.columns["label_logprob"]) for d in documents]


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
        # The row is the smallest that reaches 0.95, or the 50 likeliest.
        last = probabilities[np.arange(len(counts) - 1), counts[:-1] - 1]
        assert ((mass >= 0.95 - 1e-5) | (counts[:-1] == 50)).all()
        assert (mass - last < 0.95 + 1e-5).all()
        assert (label_logprob[:-1] <= 0).all()


def test_killed_dump_goes_on_where_it_was(world: World, teacher: Path) -> None:
    path = world.folder / "killed.pd"
    flags = world.dump_flags(teacher, "--dump-store", path)
    killed = world.runner.run("megatron_pd.teacher.dump", flags, kill_when=path)
    assert killed.statuses != [0]
    with pytest.raises(StoreError):
        LogitStore(path)
    world.runner.check("megatron_pd.teacher.dump", flags)
    for found, expected in zip(rows_of(path), rows_of(Path(f"{world.corpus}.pd")), strict=True):
        assert_same_entries(found, expected, logprob_tolerance=0.2)  # the compact codec's


def test_help_names_the_flags(bare_world: World) -> None:
    log = bare_world.runner.check("megatron_pd.teacher.dump", ["--help"])
    assert "--dump-top-p" in log and "--tensor-model-parallel-size" in log

"""Tokenizer, corpus, teacher store and the student's first weights, made once for all tests."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import LAYOUTS, PD_STAR, VOCAB_SIZE, JobRunner, World, make_corpus, write_text


@pytest.fixture(scope="session")
def bare_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A tokenizer and a corpus without a store."""
    folder = tmp_path_factory.mktemp("training")
    runner = JobRunner(folder)
    text, tokenizer, corpus = folder / "text.jsonl", folder / "tokens.model", folder / "corpus"
    write_text(text, seed=1)
    make_corpus(runner, text, tokenizer, VOCAB_SIZE, corpus)
    world = World(runner, folder, tokenizer, corpus)
    yield world
    runner.close()


@pytest.fixture(scope="session")
def teacher(bare_world: World) -> Path:
    """Checkpoint of a model that has learned something of the corpus."""
    path = bare_world.folder / "teacher"
    bare_world.train(*("--train-iters", 40, "--save", path, "--save-interval", 40))
    return path


@pytest.fixture(scope="session")
def world(bare_world: World, teacher: Path) -> World:
    """The corpus with the teacher's store beside it, and a student's first weights."""
    student = bare_world.folder / "student"
    bare_world.train(
        *("--train-iters", 1, "--lr-wsd-decay-iters", 1, "--lr-warmup-iters", 0, "--seed", 99),
        *("--save", student, "--save-interval", 1),
    )
    bare_world.dump(teacher, "--dump-codec", "exact", "--dump-statistics")
    return replace(bare_world, student=student)


@pytest.fixture(scope="session")
def sampled_store(world: World, teacher: Path) -> Path:
    """The corpus's rows as 20 random draws each."""
    path = world.folder / "sampled.pd"
    world.dump(teacher, "--dump-sampled", 20, "--dump-store", path)
    return path


@pytest.fixture(scope="session")
def layout_curves(world: World) -> dict[str, dict[str, np.ndarray]]:
    """The curves of one PD* run in every parallel layout."""
    return {
        name: world.train(*world.from_student(), *PD_STAR, *flags, ranks=ranks)
        for name, (ranks, flags) in LAYOUTS.items()
    }

"""Megatron is imported by the tests of this folder, on whatever this machine has."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_pd.megatron import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from jobs import JobRunner  # noqa: E402


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobRunner]:
    runner = JobRunner(tmp_path_factory.mktemp("jobs"))
    yield runner
    runner.close()

"""A generator that is new in every run; its seed is printed where a test fails."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy)  # type: ignore[arg-type]
    print("seed", seed)
    return np.random.default_rng(seed)

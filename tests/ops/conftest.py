"""Every test of the operators gets fresh random numbers; pytest shows the seed where one fails."""

import secrets

import agreement  # noqa: F401  (chooses the device before any test module makes a tensor)
import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
    return seed

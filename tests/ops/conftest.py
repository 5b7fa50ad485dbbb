"""Every test of the operators gets fresh random numbers; pytest shows the seed where one fails."""

import secrets

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = secrets.randbits(32)
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
    return seed

"""The kernels are held to the same agreement with the reference as the operators."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

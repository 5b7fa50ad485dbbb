"""Makes the benchmarks' common module and the experiments importable, as their scripts do."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "experiments")]

"""What the processes of a machine say of their mistakes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os
from megatron_pd.errors import UserError, reporting_errors
with reporting_errors():
    rank = int(os.environ["RANK"])
    raise UserError("what all say" if rank < 2 else f"what rank {rank} alone says")
"""


def test_each_different_sentence_is_said_once(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    found = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "3", str(script)),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert found.returncode != 0
    said = [line for line in found.stderr.splitlines() if line.startswith("error")]
    assert sum("what all say" in line for line in said) == 1
    assert "error (rank 2): what rank 2 alone says" in said
    assert len(said) == 2


AT_THE_END = """
import atexit, os, sys
from megatron_pd.cli import script
atexit.register(os.kill, os.getpid(), int(sys.argv.pop()))
script()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [["stats", "--help"], ["stats", "/nowhere"]])
def test_a_stop_after_the_end_is_no_traceback(number: signal.Signals, words: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", AT_THE_END, *words, str(int(number))],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == -number
    assert "Traceback" not in found.stderr

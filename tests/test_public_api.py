"""What the README imports is there, and reading a store needs neither torch nor Megatron."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_pd

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", megatron_pd.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(megatron_pd, name).__doc__
    assert name in dir(megatron_pd)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_pd.nothing  # noqa: B018


def test_reading_a_store_loads_neither_torch_nor_megatron() -> None:
    program = (
        "import sys; from megatron_pd import LogitStore; "
        "print(*sorted({'torch', 'megatron'} & sys.modules.keys()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.strip() == ""


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    found = subprocess.run(
        [sys.executable, "-c", blocks[0]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert found.returncode == 0, found.stderr
    assert "nats" in found.stdout

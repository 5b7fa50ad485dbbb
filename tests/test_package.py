"""What the sdist and the wheel hold. The native parts are those that are built already."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def pack(command: str, folder: Path) -> Path:
    cuda = any((ROOT / "megatron_pd/ops").glob("_operators_cuda*"))
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", command, "--dist-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"MEGATRON_PD_BUILD_CUDA": "auto" if cuda else "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


def test_the_wheel_holds_what_runs_and_no_more(tmp_path: Path) -> None:
    wheel = pack("bdist_wheel", tmp_path)
    assert re.search(r"cp\d+-cp\d+-linux", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if not name.startswith("megatron_pd-")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_pd").rglob("*.py")}
    libraries = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_pd").rglob("*.so")}
    others = {
        "megatron_pd/py.typed",
        "megatron_pd/ops/_operators.torch",
        "megatron_pd/store/_logit_codec.pyi",
    }
    tag = wheel.name.split("-")[2].replace("cp", "cpython-")
    assert package == modules | {name for name in libraries if tag in name} | others
    for library in ("ops/_operators", "store/_logit_codec"):
        assert any(name.startswith(f"megatron_pd/{library}.cpython-") for name in package)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_sdist_holds_all_that_is_tracked(tmp_path: Path) -> None:
    with tarfile.open(pack("sdist", tmp_path)) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
    names = {member.name.partition("/")[2] for member in files}
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    present = {name for name in tracked.split("\0") if name and (ROOT / name).exists()}
    assert present - names == set()
    assert not [name for name in names if name.endswith((".so", ".torch", ".pyc"))]


def test_the_exact_versions_lie_within_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    exact = {name.lower().replace("_", "-"): version for name, version in exact.items()}
    groups = project["optional-dependencies"]
    for line in (*project["dependencies"], *groups["dev"], *groups["parquet"]):
        requirement = Requirement(line)
        version = exact[requirement.name.lower()]
        assert requirement.specifier.contains(version, prereleases=True), line


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+34c6371d24.nv25.08", "2.11.0+cu130"])
def test_a_torch_that_is_there_satisfies_the_range(version: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(d for d in map(Requirement, project["dependencies"]) if d.name == "torch")
    assert torch.specifier.contains(version, prereleases=True)

"""`make lint` in a git checkout and outside of one; the environment and its tools are stand-ins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project whose environment is set up, with tools that are content with everything."""
    folder = tmp_path / "a project"
    for name in ("csrc", "tests", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", ".gitignore", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("tools/set_up.sh", ".venv/bin/python", ".venv/bin/shellcheck"):
        script = folder / name
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
    for stamp in (".installed", ".built"):
        (folder / ".venv" / stamp).touch()
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "lint"], cwd=folder, capture_output=True, text=True)


def test_a_clean_checkout_passes(folder: Path) -> None:
    git(folder, "init")
    git(folder, "add", ".")
    assert lint(folder).returncode == 0
    assert not (folder / ".git/index").read_bytes().count(b".venv")


def test_a_link_of_that_name_is_ignored_like_the_folder(folder: Path) -> None:
    shutil.rmtree(folder / ".venv")
    os.symlink("/nowhere", folder / ".venv")
    git(folder, "init")
    git(folder, "add", ".")
    assert not (folder / ".git/index").read_bytes().count(b".venv")


def test_a_tracked_link_is_refused(folder: Path) -> None:
    git(folder, "init")
    os.symlink("/somewhere/else", folder / "data")
    git(folder, "add", ".")
    done = lint(folder)
    assert done.returncode != 0
    assert "data" in done.stdout
    assert "error: git tracks these links" in done.stderr


def test_a_tracked_file_that_is_ignored_is_refused(folder: Path) -> None:
    git(folder, "init")
    (folder / "operators.so").touch()
    git(folder, "add", "--force", "operators.so")
    done = lint(folder)
    assert done.returncode != 0
    assert "operators.so" in done.stdout
    assert "error: git tracks these files, which .gitignore names" in done.stderr


def test_without_a_checkout_there_is_nothing_to_refuse(folder: Path) -> None:
    os.symlink("/somewhere/else", folder / "data")
    assert lint(folder).returncode == 0

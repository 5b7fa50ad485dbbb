"""tools/set_up.sh: what it finds at .venv, what it finds missing, and what it says.

The interpreter is real; its `venv` and `pip` are stand-ins (PYTHONPATH) that fetch nothing: an
environment is a link to the interpreter, and pip writes down what it was asked for.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = getattr(sys, "_base_executable", sys.executable)
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

VENV = """\
import os, sys
folder = os.path.abspath(sys.argv[1])
os.makedirs(folder + "/bin")
os.symlink(sys.executable, folder + "/bin/python")
open(folder + "/bin/activate", "w").close()
with open(folder + "/pyvenv.cfg", "w") as file:
    file.write(f"home = {os.path.dirname(sys.executable)}\\n")
    file.write("include-system-site-packages = false\\n")
    file.write(f"command = {sys.executable} -m venv {folder}\\n")
"""
PIP = """\
import sys
with open("pip.log", "a") as file:
    print(*sys.argv[1:], file=file)
"""
TOOLS = "cat cut dirname find grep head ls mkdir readlink rm sed sh touch".split()


class Project:
    """A folder with what set_up.sh reads, a PATH of its own and the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project's folder"
        (self.folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "set_up.sh", self.folder / "tools")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)
            os.utime(self.folder / name, (1, 1))  # a checkout of long ago
        self.commands = folder / "commands"
        self.commands.mkdir()
        for tool in TOOLS:
            (self.commands / tool).symlink_to(shutil.which(tool))
        self.stand_ins = folder / "stand-ins"
        for module, text in {"venv": VENV, "pip": PIP}.items():
            (self.stand_ins / module).mkdir(parents=True)
            (self.stand_ins / module / "__init__.py").touch()
            (self.stand_ins / module / "__main__.py").write_text(text)
        self.command("python3.12", f'exec {PYTHON} "$@"')
        self.command("g++", "exit 0")

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def command(self, name: str, script: str) -> None:
        path = self.commands / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.commands / name).unlink()

    def set_up(self, venv: str = ".venv", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tools/set_up.sh", venv],
            cwd=self.folder,
            env={
                "PATH": str(self.commands),
                "HOME": str(self.folder),
                "PYTHONPATH": str(self.stand_ins),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def pip_calls(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def python_that(change: str) -> str:
    """A shell script: the real interpreter, which first runs `change`, then the -c code."""
    return f"""exec {PYTHON} -c 'import sys; {change}; exec(sys.argv[1])' "$2\""""


OLD = "sys.version_info = (3, 11, 2)"


def set_up_fully(project: Project) -> None:
    done = project.set_up()
    assert done.returncode == 0, done.stderr
    assert len(project.pip_calls()) == 2


# --- what lies at .venv ---------------------------------------------------------------------------


def test_a_new_environment_gets_the_exact_versions_once(project: Project) -> None:
    done = project.set_up()
    assert done.returncode == 0, done.stderr
    assert "Installing torch, megatron-core" in done.stdout
    assert (project.venv / "pyvenv.cfg").exists()
    native, package = project.pip_calls()
    assert all("--constraint constraints.txt" in call for call in (native, package))
    assert "torch" in native
    assert "--no-build-isolation --editable .[dev]" in package
    again = project.set_up()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert project.pip_calls() == [native, package]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_new_requirements_are_installed(project: Project, name: str) -> None:
    set_up_fully(project)
    (project.folder / name).touch()
    assert project.set_up().returncode == 0
    assert len(project.pip_calls()) == 4


def test_an_interrupted_installation_goes_on(project: Project) -> None:
    set_up_fully(project)
    (project.venv / ".installed").unlink()
    (project.venv / "kept").touch()
    assert project.set_up().returncode == 0
    assert (project.venv / "kept").exists()
    assert len(project.pip_calls()) == 4


def python_is_gone(project: Project) -> None:
    (project.venv / "bin/python").unlink()
    (project.venv / "bin/python").symlink_to("/nowhere/python3.12")


def python_is_old(project: Project) -> None:
    (project.venv / "bin/python").unlink()
    (project.venv / "bin/python").write_text(f"#!/bin/sh\n{python_that(OLD)}\n")
    (project.venv / "bin/python").chmod(0o755)


def folder_was_renamed(project: Project) -> None:
    project.folder = project.folder.rename(project.folder.with_name("elsewhere"))


def pip_is_missing(project: Project) -> None:
    shutil.rmtree(project.stand_ins / "pip")


def link_leads_nowhere(project: Project) -> None:
    shutil.rmtree(project.venv)
    project.venv.symlink_to("/nowhere/.venv")


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (python_is_gone, "its Python doesn't run"),
        (python_is_old, "its Python is 3.11, and 3.12 or 3.13 is needed"),
        (folder_was_renamed, "it was made in another folder"),
        (pip_is_missing, "it has no pip"),
        (link_leads_nowhere, "a link to /nowhere/.venv, which doesn't exist"),
    ],
)
def test_a_broken_environment_is_replaced(
    project: Project, breaks: Callable[[Project], None], says: str
) -> None:
    set_up_fully(project)
    (project.venv / "of the old one").touch()
    breaks(project)
    done = project.set_up()
    assert says in done.stdout
    assert done.stdout.splitlines()[0].endswith("replacing it")
    assert not project.venv.is_symlink()
    assert not (project.venv / "of the old one").exists()
    assert (project.venv / "bin/python").resolve() == Path(PYTHON).resolve()
    if breaks is not pip_is_missing:  # there the new one has none either
        assert done.returncode == 0, done.stderr
        assert (project.venv / ".installed").exists()


def test_nothing_is_removed_where_no_python_can_replace_it(project: Project) -> None:
    set_up_fully(project)
    python_is_gone(project)
    project.lacks("python3.12")
    assert project.set_up().returncode == 1
    assert (project.venv / "pyvenv.cfg").exists()


def a_link_to_an_environment(project: Project) -> None:
    set_up_fully(project)
    project.venv.rename(project.folder / "other")
    project.venv.symlink_to(project.folder / "other")


def a_folder_of_something_else(project: Project) -> None:
    project.venv.mkdir()
    (project.venv / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize("foreign", [a_link_to_an_environment, a_folder_of_something_else])
def test_what_is_somebody_elses_is_left_alone(
    project: Project, foreign: Callable[[Project], None]
) -> None:
    foreign(project)
    before = sorted(os.walk(project.folder, followlinks=True))
    done = project.set_up()
    assert done.returncode == 1
    assert done.stderr.startswith("error: .venv is ")
    assert "make VENV=/path/to/it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(os.walk(project.folder, followlinks=True)) == before


def test_another_place_can_be_named(project: Project, tmp_path: Path) -> None:
    place = tmp_path / "environments" / "pd"
    assert project.set_up(str(place)).returncode == 0
    assert (place / ".installed").exists()
    assert project.set_up(str(place)).stdout == ""


# --- what the machine lacks -----------------------------------------------------------------------


def test_all_that_is_missing_is_one_sentence(project: Project) -> None:
    project.lacks("g++", "python3.12")
    done = project.set_up()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for words in (
        "error: this machine lacks a C++ compiler",
        "apt-get install g++",
        "a Python of version 3.12",
        "apt-get install python3-venv python3-dev",
        "uv python install 3.12",
        "make PYTHON=/path/to/python3.12",
    ):
        assert words in done.stderr
    assert not project.venv.exists()


def test_a_compiler_that_is_too_old_counts_as_none(project: Project) -> None:
    project.command("g++", "exit 1")
    assert "lacks a C++ compiler, g++ >= 11" in project.set_up().stderr
    project.command("my-g++", '[ "$1" = -m64 ]')
    assert project.set_up(CXX="my-g++ -m64").returncode == 0


@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_a_python_of_another_version_is_named(project: Project, version: str) -> None:
    project.lacks("python3.12")
    project.command("python3", python_that(f"sys.version_info = ({version.replace('.', ', ')})"))
    done = project.set_up()
    assert "lacks a Python of version 3.12 or 3.13" in done.stderr
    assert f"(found: {version})" in done.stderr


def test_a_python_without_venv_and_headers_names_their_packages(project: Project) -> None:
    hidden = 'sys.modules["ensurepip"] = None; import os; os.path.exists = lambda path: False'
    project.command("python3.12", python_that(hidden))
    packages = f"apt-get install python{VERSION}-venv python{VERSION}-dev"
    assert packages in project.set_up().stderr


def test_a_python_that_is_named_is_the_only_one_tried(project: Project) -> None:
    done = project.set_up(PYTHON="/nowhere/python")
    assert "which PYTHON=/nowhere/python isn't" in done.stderr
    project.lacks("python3.12")
    project.command("my python", f'exec {PYTHON} "$@"')
    assert project.set_up(PYTHON=str(project.commands / "my python")).returncode == 0


def test_an_interpreter_of_pyenv_is_found_without_its_shim(project: Project) -> None:
    project.command("python3.12", "exit 127")
    interpreter = project.folder / ".pyenv/versions/3.12.9/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(PYTHON)
    assert project.set_up().returncode == 0


UV = """
case "$*" in
    "python install --quiet 3.12") echo > "$HOME/uv-has-it"; exit {installs} ;;
    "python find --system --no-project "*) [ -e "$HOME/uv-has-it" ] && echo {python} ;;
    *) exit 2 ;;
esac
"""


def test_uv_gets_a_python_where_there_is_none(project: Project) -> None:
    project.lacks("python3.12")
    project.command("uv", UV.format(installs=0, python=PYTHON))
    done = project.set_up()
    assert done.returncode == 0, done.stderr
    assert "`uv python install 3.12` gets one" in done.stdout
    assert (project.venv / ".installed").exists()


def test_uv_without_a_network_leaves_the_sentence(project: Project) -> None:
    project.lacks("python3.12")
    project.command("uv", UV.format(installs=1, python=PYTHON))
    assert "error: this machine lacks a Python of version 3.12" in project.set_up().stderr

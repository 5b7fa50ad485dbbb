"""setuptools' build backend for an extension that is built against the torch it will run with.

pip builds in an environment of its own, into which it would fetch the newest torch, whatever torch
the extension is to run with. So the installation's own torch is used where there is one, and only
where there is none does the build ask for one.
"""

import importlib.util
import site
import tomllib
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def torch_requirement() -> list[str]:
    if importlib.util.find_spec("torch"):
        return []
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    return [dependency for dependency in dependencies if dependency.startswith("torch>=")]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()


if importlib.util.find_spec("torch") is None:
    # pip's environment hides the folders of the one that it installs into; Python still knows them.
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        site.addsitedir(folder)

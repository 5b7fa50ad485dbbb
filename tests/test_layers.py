"""A folder uses only those below it, and few know Megatron: read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_pd"

# From the top; a module may import from its own layer and from those below.
LAYERS = (
    "__init__",
    "pretrain",
    "cli",
    "evaluate",
    "cluster",
    "train",
    "teacher",
    "hf",
    "megatron",
    "data",
    "store",
    "distill",
    "ops",
    "options",
    "registry",
    "workers",
    "errors",
)
KNOW_MEGATRON = {"megatron", "data", "teacher", "hf", "train", "cluster"}
KNOW_TORCH = KNOW_MEGATRON | {"evaluate", "distill", "ops"}
KNOW_ARGPARSE = {"cli", "evaluate", "teacher", "hf", "megatron", "train", "options", "cluster"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(module: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it, `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_has_its_layer() -> None:
    assert {layer_of(module) for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(module: Path) -> None:
    own = layer_of(module)
    for name in imported(module):
        package, *rest = name.split(".")
        if package == "megatron_pd" and rest[0] in LAYERS:
            assert LAYERS.index(rest[0]) >= LAYERS.index(own), f"{own} is below {name}"
        assert package != "megatron" or own in KNOW_MEGATRON, name
        assert package != "torch" or own in KNOW_TORCH, name
        assert package != "argparse" or own in KNOW_ARGPARSE, name

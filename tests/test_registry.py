"""Named things: the built-ins, and what a name imports."""

import pytest

from megatron_pd.errors import UserError
from megatron_pd.registry import Registry


@pytest.fixture
def registry() -> Registry[int]:
    registry: Registry[int] = Registry("number", int)
    registry.add("one", 1)
    registry.add("two", 2)
    return registry


def test_built_ins(registry: Registry[int]) -> None:
    assert registry.names == tuple(registry) == ("one", "two")
    assert registry.get("two") == 2
    assert "one" in registry and "three" not in registry
    with pytest.raises(ValueError, match="a number 'one' already"):
        registry.add("one", 3)


def test_names_that_are_imported(registry: Registry[int]) -> None:
    assert "sys:maxsize" in registry
    assert registry.get("sys:maxsize") > 1 << 60


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("three", "no number 'three': choose one of one, two, or give your own as package.module"),
        ("no_such_module:x", "'no_such_module:x' can't be imported .*PYTHONPATH"),
        ("sys:no_such", "'sys:no_such' can't be imported"),
        (":x", "can't be imported"),
        ("sys:path", "sys:path is a list, which is no number"),
    ],
)
def test_what_is_none(registry: Registry[int], name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        registry.get(name)

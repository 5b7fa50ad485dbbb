"""Options that a frozen dataclass names once: value, default, help and command-line flag.

For example

    @dataclass(frozen=True)
    class DumpConfig:
        top_k: int | None = option(None, "Keep so many entries.", type=int)

    add_options(group, DumpConfig, "dump")            # --dump-top-k
    DumpConfig(**given_options(args, DumpConfig, "dump"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any

from megatron_pd.registry import Registry

if TYPE_CHECKING:
    import argparse

__all__ = ["add_options", "flag_name", "given_options", "option", "options_of"]


def option(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field with its one description.

    Args:
        flag: what its command-line flag takes, as for `add_argument`: type, choices, nargs, …
    """
    return field(default=default, metadata={"help": help, "flag": flag})


def options_of(config: Any) -> Iterator[Field[Any]]:
    """The fields of a dataclass, or of its instance, that are options."""
    return (option for option in fields(config) if "flag" in option.metadata)


def flag_name(prefix: str, name: str) -> str:
    """The command-line flag of a field: --prefix-name."""
    return f"--{prefix}-{name}".replace("_", "-")


def add_options(group: argparse._ActionsContainer, config: type, prefix: str) -> None:
    """Add a flag for every option of `config`. What isn't given is None after parsing.

    Choices from a Registry are shown and left to `config` to check, since what can be imported is
    one too.
    """
    for chosen in options_of(config):
        keywords = dict(chosen.metadata["flag"])
        if isinstance(keywords.get("choices"), Registry):
            names = keywords.pop("choices").names
            keywords["metavar"] = f"{{{','.join(names)},package.module:attribute}}"
        if isinstance(chosen.default, bool):
            keywords["action"] = "store_true"
        if "type" in keywords and "choices" not in keywords:
            keywords.setdefault("metavar", chosen.name.rsplit("_", 1)[-1].upper())
        shown = "" if chosen.default in (None, False) else f" Default: {chosen.default}."
        group.add_argument(
            flag_name(prefix, chosen.name),
            dest=f"{prefix}_{chosen.name}",
            default=None,
            help=(chosen.metadata["help"] + shown).replace("%", "%%"),
            **keywords,
        )


def given_options(args: argparse.Namespace, config: type, prefix: str) -> dict[str, Any]:
    """The options that the command line gives: field → value."""
    return {
        chosen.name: value
        for chosen in options_of(config)
        if (value := getattr(args, f"{prefix}_{chosen.name}", None)) is not None
    }

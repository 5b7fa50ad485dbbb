"""Named things of one kind (losses, tail policies, codecs, α schedules), the package's and others'.

A choice on the command line is the name of a built-in, or `package.module:attribute` of anything
that can be imported, so that an addition needs no change in this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from megatron_pd.errors import UserError

__all__ = ["Registry"]


class Registry[Thing]:
    """Name → thing, in the order of registration."""

    def __init__(self, what: str, kind: type[Thing]) -> None:
        """
        Args:
            what: one of the things, as an error calls it: "loss", "tail policy".
            kind: the type of all of them.
        """
        self.what = what
        self._kind = kind
        self._things: dict[str, Thing] = {}

    def add(self, name: str, thing: Thing) -> Thing:
        """Register a built-in; returns it. ValueError where the name is taken."""
        if name in self._things:
            raise ValueError(f"There is a {self.what} {name!r} already.")
        self._things[name] = thing
        return thing

    @property
    def names(self) -> tuple[str, ...]:
        """The built-ins."""
        return tuple(self._things)

    def __contains__(self, name: object) -> bool:
        """Whether it may be a choice: a built-in, or the name of something to import."""
        return name in self._things or (isinstance(name, str) and ":" in name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def get(self, name: str) -> Thing:
        """The built-in of that name, or what `package.module:attribute` imports.

        Raises:
            UserError: there is none, it can't be imported, or it is something else.
        """
        if name in self._things:
            return self._things[name]
        module_name, colon, attribute = name.partition(":")
        if not colon:
            raise UserError(
                f"There is no {self.what} {name!r}: choose one of {', '.join(self._things)}, or "
                "give your own as package.module:attribute."
            )
        try:
            thing = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, ValueError, AttributeError) as error:
            raise UserError(
                f"The {self.what} {name!r} can't be imported ({error}): check the spelling, and "
                "that its folder is on PYTHONPATH."
            ) from error
        if not isinstance(thing, self._kind):
            raise UserError(
                f"{name} is a {type(thing).__name__}, which is no {self.what}: see CONTRIBUTING.md."
            )
        return thing

"""Mistakes in what the user gave, and how a command reports them."""

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["UserError", "reporting_errors"]


class UserError(ValueError):
    """Bad input. The message names the file or flag, what was found, and the fix."""


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """A `UserError` raised inside becomes one sentence on stderr, and exit status 2.

    Under torchrun only the first process of each node speaks.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

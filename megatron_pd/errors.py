"""Mistakes in what the user gave, and how a command reports them."""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["UserError", "reporting_errors"]

_GRACE_SECONDS = 1  # torchrun ends all others when one exits; they may have something to say too


class UserError(ValueError):
    """Bad input. The message names the file or flag, what was found, and the fix."""


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """A `UserError` raised inside becomes one sentence on stderr, and exit status 2.

    Under torchrun the processes of a machine say each different sentence once, with the rank that
    came first.
    """
    try:
        yield
    except UserError as error:
        if _is_first_to_say(str(error)):
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f" (rank {rank})"
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(_GRACE_SECONDS)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_first_to_say(sentence: str) -> bool:
    """Whether no other process of this machine's torchrun has said it, by a file beside those in
    which torchrun collects its workers' errors: ATTEMPT/RANK/error.json."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    name = f"said-{hashlib.blake2b(sentence.encode(), digest_size=8).hexdigest()}"
    try:
        (Path(error_file).parents[1] / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # rather twice than never
    return True

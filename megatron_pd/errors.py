"""Mistakes in what the user gave, what else ends a command, and how it is reported.

Exit statuses, of every command:

    0    done; what was to be checked is sound
    1    what was checked is damaged, or a file, a disk, the memory or a process failed
    2    a wrong call: a flag, its value, or something else than what the flag takes
    130  stopped by Ctrl-C (SIGINT)
    141  whoever read the output has gone (SIGPIPE)
    143  stopped by SIGTERM
"""

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

__all__ = [
    "Terminated",
    "UserError",
    "if_stopped",
    "naming",
    "reporting_errors",
    "stop_on_sigterm",
]

_GRACE_SECONDS = 1  # torchrun ends all others when one exits; they may have something to say too


class UserError(ValueError):
    """Bad input. The message names the file or flag, what was found, and the fix."""

    exit_status = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which batch systems stop a job: as Ctrl-C, but for the exit status."""


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def if_stopped(note: str) -> Iterator[None]:
    """What `reporting_errors` says where the body is interrupted: what is kept, how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(note)
        raise


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the body that knows no file, as those of reads and writes, is of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def reporting_errors(*, unexpected: bool = False) -> Iterator[None]:
    """What ends the body becomes one sentence on stderr, and an exit status as listed above.

    Under torchrun the processes of a machine say each different sentence once, with the rank that
    came first.

    Args:
        unexpected: exceptions that say nothing to a user, too: the traceback goes to a file.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C is for those in a hurry
        notes = "; ".join(getattr(stop, "__notes__", ()))
        _say(f"stopped: {notes}." if notes else "stopped.")
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except OSError as error:
        name = _file_of(error)
        if isinstance(error, BrokenPipeError) and name == _STANDARD_OUTPUT:
            sys.exit(141)
        _fail(f"{name}: {error.strerror or error}.", 1)
    except MemoryError:
        _fail("no memory is left: free some, or give the command less to do at a time.", 1)
    except Exception as error:
        if not unexpected:
            raise
        _fail(_unexpected(error), 1)


_STANDARD_OUTPUT = "standard output"


def _fail(sentence: str, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    _say(f"error{'' if rank == '0' else f' (rank {rank})'}: {sentence}", sentence)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(_GRACE_SECONDS)
    sys.exit(status)


def _say(line: str, sentence: str | None = None) -> None:
    if _is_first_to_say(sentence or line):
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stderr.write(f"{line}\n")  # at once, or the lines of two ranks mix
            sys.stderr.flush()


def _file_of(error: OSError) -> str:
    if error.filename is not None:
        return str(error.filename)
    try:
        sys.stdout.flush()  # what could not be written is still there, and fails again
    except OSError:
        # The interpreter would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _STANDARD_OUTPUT
    return "input or output"


def _unexpected(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    sentence = f"{type(error).__name__}: {error}. This should not happen: please report it"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="megatron-pd-", suffix=".traceback", delete=False, errors="replace"
        ) as file:
            file.write(text)
    except OSError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{sentence}, with {frame.filename}, line {frame.lineno}."
    return f"{sentence}, with the traceback in {file.name}."


def _is_first_to_say(sentence: str) -> bool:
    """Whether no other process of this machine's torchrun has said it, by a file beside those in
    which torchrun collects its workers' errors: ATTEMPT/RANK/error.json."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    name = f"said-{hashlib.blake2b(sentence.encode(errors='replace'), digest_size=8).hexdigest()}"
    try:
        (Path(error_file).parents[1] / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # rather twice than never
    return True

"""What an interrupted check has found, in a file until the check is done.

A line of JSON per piece of work: what it found, when, and of which file. It counts only while that
file has the same path, size, inode and times of change: a write through the file system sets the
inode's time of change, which no one can set back, even where the time of modification was. What it
can't know is that the disk has lost bytes since; so a verdict that rests on it says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_pd.errors import naming

__all__ = ["Journal", "file_identity"]


class Journal:
    """
    Args:
        path: of the file; what an earlier check left there is read.
        anew: forget that.
    Attributes:
        taken: what was known already: since when, until when (seconds of the epoch); None: nothing.
        taken_units: of work that was known already.
    Raises:
        OSError: the file can't be read or written; `filename` is its path.
    """

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        self._path = path
        self._found: dict[str, tuple[list[str], float]] = {}
        self.taken: tuple[float, float] | None = None
        self.taken_units = 0
        self._failed = False
        with naming(path):
            self._file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
            if anew:
                self._file.truncate(0)
            self._file.seek(0)
            for line in self._file:
                try:
                    entry = json.loads(line)
                    self._found[entry["of"]] = (list(entry["problems"]), float(entry["at"]))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # torn when its writer was stopped

    def take(self, key: str, units: int) -> list[str] | None:
        """What is known of a piece of work of so many units; None: nothing."""
        if key not in self._found:
            return None
        problems, at = self._found[key]
        first, last = self.taken or (at, at)
        self.taken = (min(first, at), max(last, at))
        self.taken_units += units
        return problems

    def add(self, key: str, problems: list[str]) -> None:
        """Keep what a piece of work has found, as long as the file can be written."""
        if self._failed:
            return
        entry: dict[str, Any] = {"of": key, "problems": problems, "at": round(time.time(), 1)}
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError:
            self._failed = True  # a torn line is none; another behind it would be torn too

    def close(self) -> None:
        """Everything was checked: the next check starts anew."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()


def file_identity(path: Path) -> str:
    """What a file's entries count for."""
    with naming(path):
        status = os.stat(path)
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{os.path.realpath(path)} {status.st_ino} {status.st_size} {times}"

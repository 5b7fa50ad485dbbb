"""How far the stages are: bars on a terminal, a line at each begin and end elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["StageProgress", "progress_on"]


class StageProgress(Protocol):
    """What is told about the stages, in their order."""

    def begin(self, name: str) -> None: ...
    def advance(self, share: float) -> None:
        """`share`, from 0 to 1, of the stage is done."""

    def end(self, seconds: float) -> None: ...
    def skip(self, name: str, seconds: float) -> None:
        """An earlier run did this one, in so many seconds."""


@contextmanager
def progress_on(stream: TextIO, names: Sequence[str]) -> Iterator[StageProgress]:
    """Shows the stages of these names on a stream."""
    console = Console(file=stream, width=100)
    if not stream.isatty() or console.is_dumb_terminal:
        yield Lines(stream, len(names))
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield Bars(bars)


class Bars:
    """A bar for every stage that has begun."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def begin(self, name: str) -> None:
        self._task = self._bars.add_task(name, total=1.0)

    def advance(self, share: float) -> None:
        self._bars.update(self._task, completed=share)

    def end(self, seconds: float) -> None:
        self.advance(1.0)

    def skip(self, name: str, seconds: float) -> None:
        self.begin(name)
        self.end(seconds)


class Lines:
    """A line when a stage begins and one when it ends."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream, self._total, self._number = stream, total, 0

    def begin(self, name: str) -> None:
        self._number += 1
        self._stage = f"[{self._number}/{self._total}] {name}"
        self._print(f"{self._stage} begins")

    def advance(self, share: float) -> None:
        pass

    def end(self, seconds: float) -> None:
        self._print(f"{self._stage} took {seconds:.1f} s")

    def skip(self, name: str, seconds: float) -> None:
        self._number += 1
        self._print(f"[{self._number}/{self._total}] {name} was done before, in {seconds:.1f} s")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

"""Writing while the teacher computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

__all__ = ["Beside"]


class Beside:
    """A thread that does what it is given, piece by piece, while the caller goes on.

    What a piece raises comes out of the next call, or of the end of the `with` block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Wait until all before it is done, then begin function(*arguments)."""
        self.wait()
        self._last = self._thread.submit(function, *arguments)

    def finish(self) -> None:
        """Return when all is done, whatever came of it."""
        if self._last is not None:
            self._last.exception()

    def wait(self) -> None:
        """Return when all is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

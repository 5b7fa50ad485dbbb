"""The next micro-batch is fetched while this one trains.

Megatron's data loader does so only where `--num-workers` gives it processes, which hand every
tensor over by a file descriptor. A thread beside the step hides both ways: reading the teacher's
rows, which runs without Python's lock, and waiting for the workers.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron.core.rerun_state_machine import RerunDataIterator

__all__ = ["Prefetched", "prefetch"]


class Prefetched(Iterator[Any]):
    """The items of an iterator; the fetching of each begins when the one before it is taken.

    What ends the iterator, or fails in it, is raised when that item is asked for.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: Future[Any] = self._thread.submit(next, self._items)

    def __next__(self) -> Any:
        item = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return item


def prefetch(iterator: RerunDataIterator) -> None:
    """Let Megatron's iterator prefetch from now on.

    Underneath Megatron's replay of micro-batches and what it counts as consumed, so that
    checkpoints, replays and resumed runs stay as they are.
    """
    if not isinstance(iterator.iterable, Prefetched):
        iterator.iterable = Prefetched(iterator.iterable)

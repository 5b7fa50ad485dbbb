"""A function over many items in several processes, results in the order of the items.

multiprocessing's pool waits for ever for the result of a worker that was killed, and
concurrent.futures may where the kill came amid a result: all of its workers share one pipe. Here
each worker has a socket of its own whose other end nobody else holds, so that the end of a worker
is the end of its socket.
"""

import errno
import itertools
import multiprocessing
import selectors
import signal
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["ordered_map"]

_STOPS = (signal.SIGINT, signal.SIGTERM)


def ordered_map[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """Yield function(item) of every item, computed in `workers` forked processes.

    `items` are drawn in this process as they are needed, so few ahead that at most four a worker
    are in memory, as items or as results. Workers hold what this process holds when the first
    result is asked for; they leave SIGINT and SIGTERM to it, and closing the generator ends them.

    Raises:
        ChildProcessError: a worker ended, for example killed as memory ran out; `filename` is its
            item, as a string.
        OSError: ENOMEM, likewise, where a worker could tell.
        Exception: what `function` raised, in its item's turn.
    """
    pool: list[_Worker] = []
    selector = selectors.DefaultSelector()
    try:
        for _ in range(workers):
            pool.append(_Worker(function, [worker.connection for worker in pool]))
            selector.register(pool[-1].connection, selectors.EVENT_READ, pool[-1])
        idle = list(pool)
        source = iter(items)
        upcoming = list(itertools.islice(source, 1))
        results: dict[int, Any] = {}
        started = yielded = 0
        while upcoming or started > yielded:
            must_wait = yielded not in results and len(idle) < workers
            for key, _ in selector.select(None if must_wait else 0):
                results.update([key.data.take()])
                idle.append(key.data)
            while upcoming and idle and started < yielded + 4 * workers:
                idle.pop().give(started, upcoming.pop())
                started += 1
                # Drawn while the workers are busy, so that none will wait for it.
                upcoming.extend(itertools.islice(source, 1))
            if yielded in results:
                succeeded, result = results.pop(yielded)
                if not succeeded:
                    raise result
                yield result
                yielded += 1
    finally:
        for worker in pool:
            worker.end()
        selector.close()


class _Worker:
    """A process that answers one item at a time, so neither side ever blocks in sending."""

    def __init__(self, function: Callable[[Any], Any], elder: list[Connection]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(function, other_end, [self.connection, *elder]), daemon=True
        )
        # A signal between the fork and the worker's first line would find this process's handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other_end.close()
        self._number = -1
        self._item: Any = "waiting for work"

    def give(self, number: int, item: Any) -> None:
        self._number, self._item = number, item
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._died() from error

    def take(self) -> tuple[int, tuple[bool, Any]]:
        """The number of the item, and whether what follows is its result or an exception."""
        try:
            return self._number, self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def end(self) -> None:
        self._process.kill()  # it holds nothing that would have to be put in order
        self._process.join()
        self.connection.close()

    def _died(self) -> ChildProcessError:
        self._process.join()
        status = self._process.exitcode or 0
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        return ChildProcessError(
            errno.ECHILD,
            f"the worker that had this {how}: start again, with fewer workers if it was the memory",
            str(self._item),
        )


def _serve(
    function: Callable[[Any], Any], connection: Connection, others: list[Connection]
) -> None:
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    for other in others:  # inherited; with these open no worker would see the parent end
        other.close()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(item))
        except MemoryError:
            again = "start again, with fewer workers"
            reason = f"no memory was left for the worker that had this: {again}"
            answer = (False, OSError(errno.ENOMEM, reason, str(item)))
        except Exception as error:
            error.add_note(f"In a worker:\n{traceback.format_exc()}")
            answer = (False, error)
        try:
            connection.send(answer)
        except OSError:
            return

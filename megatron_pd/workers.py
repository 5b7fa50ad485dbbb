"""Work in several processes, whose death is an error at once.

multiprocessing's pool waits for ever for the result of a worker that was killed, and
concurrent.futures may where the kill came amid a result: all of its workers share one pipe. Here
each worker has a socket of its own whose other end nobody else holds, so that the end of a worker
is the end of its socket. A worker whose parent was killed ends too.

Workers hold what the parent holds when they start. They leave SIGINT and SIGTERM to it, and are
ended by SIGKILL: what they do must survive that at any moment.
"""

import contextlib
import errno
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import selectors
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Self

__all__ = ["Answer", "Report", "Workers", "ordered_map", "stops_wait"]

Report = Callable[[int], None]

_STOPS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 0.1  # between two reports, and between two looks whether the parent lives


@contextlib.contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when the body is done.

    By handlers, for a mask holds for one thread, and the libraries' own threads take the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in _STOPS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


class Answer(NamedTuple):
    """What a worker said.

    Attributes:
        number: of its item.
        units: done since the last answer of this item, as the function reported them.
        outcome: None while it goes on; else whether it succeeded, and its result or exception.
    """

    number: int
    units: int
    outcome: tuple[bool, Any] | None

    def result(self) -> Any:
        """The result of an item that is done; raises its exception."""
        assert self.outcome is not None
        succeeded, result = self.outcome
        if not succeeded:
            raise result
        return result


class Workers:
    """Forked processes that each compute function(item, report) of one item at a time.

    A context manager: its end is that of the processes.

    Args:
        function: calls `report(n)` whenever it has done n more units of its work.
    """

    def __init__(self, function: Callable[[Any, Report], Any], count: int) -> None:
        self._function, self._count = function, count
        self._pool: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        # Also where an interrupt leaves the `with` block's frame in a traceback: the interpreter's
        # end would ask them by SIGTERM, and wait for ever.
        self._end = multiprocessing.util.Finalize(self, _end, (self._pool,), exitpriority=1)

    def __enter__(self) -> Self:
        with stops_wait():  # in a worker, too, until it ignores them
            for _ in range(self._count):
                elder = [worker.connection for worker in self._pool]
                self._pool.append(_Worker(self._function, elder))
                self._selector.register(
                    self._pool[-1].connection, selectors.EVENT_READ, self._pool[-1]
                )
        self._idle = list(self._pool)
        return self

    def __exit__(self, *exception: object) -> None:
        with stops_wait():
            self._end()
            self._selector.close()

    @property
    def idle(self) -> int:
        """How many have no item."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._pool) - len(self._idle)

    def give(self, number: int, item: Any) -> None:
        """Hand an item to an idle worker. Raises ChildProcessError: it has died."""
        self._idle.pop().give(number, item)

    def answers(self, *, wait: bool = True) -> Iterator[Answer]:
        """What has been said; with `wait`, once anything has.

        Raises:
            ChildProcessError: a worker died; the text says how, `filename` is its item, as a
                string.
        """
        for key, _ in self._selector.select(None if wait else 0):
            answer = key.data.take()
            if answer.outcome is not None:
                self._idle.append(key.data)
            yield answer


def ordered_map[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """Yield function(item) of every item, computed in `workers` processes, in the items' order.

    `items` are drawn in this process as they are needed, so few ahead that at most four a worker
    are in memory, as items or as results. Closing the generator ends the processes.

    Raises:
        ChildProcessError: a worker ended, for example killed as memory ran out; `filename` is its
            item, as a string.
        OSError: ENOMEM, likewise, where a worker could tell.
        Exception: what `function` raised, in its item's turn.
    """
    with Workers(lambda item, report: function(item), workers) as pool:
        source = iter(items)
        upcoming = list(itertools.islice(source, 1))
        names: dict[int, str] = {}
        done: dict[int, Answer] = {}
        started = yielded = 0
        while upcoming or started > yielded:
            try:
                for answer in pool.answers(wait=yielded not in done and pool.busy > 0):
                    done[answer.number] = answer
                while upcoming and pool.idle and started < yielded + 4 * workers:
                    item = upcoming.pop()
                    names[started] = str(item)
                    pool.give(started, item)
                    started += 1
                    # Drawn while the workers are busy, so that none will wait for it.
                    upcoming.extend(itertools.islice(source, 1))
            except ChildProcessError as error:
                raise ChildProcessError(
                    errno.ECHILD,
                    f"the worker that had this {error.strerror}: start again, with fewer workers "
                    "if it was the memory",
                    error.filename,
                ) from error
            if yielded in done:
                name = names.pop(yielded)
                try:
                    result = done.pop(yielded).result()
                except MemoryError as error:
                    raise OSError(
                        errno.ENOMEM,
                        "no memory was left for the worker that had this: start again, with fewer "
                        "workers",
                        name,
                    ) from error
                yield result
                yielded += 1


def _end(pool: list["_Worker"]) -> None:
    for worker in pool:
        worker.end()


class _Worker:
    """A process that answers one item at a time, so neither side ever blocks in sending it."""

    def __init__(self, function: Callable[[Any, Report], Any], elder: list[Connection]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(function, other_end, [self.connection, *elder], os.getpid()),
            daemon=True,
        )
        self._process.start()
        other_end.close()
        self._number = -1
        self._item: Any = "waiting for work"

    def give(self, number: int, item: Any) -> None:
        self._number, self._item = number, item
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._died() from error

    def take(self) -> Answer:
        try:
            return Answer(self._number, *self.connection.recv())
        except (EOFError, OSError) as error:
            raise self._died() from error

    def end(self) -> None:
        self._process.kill()
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
        return ChildProcessError(errno.ECHILD, how, str(self._item))


def _serve(
    function: Callable[[Any, Report], Any],
    connection: Connection,
    others: list[Connection],
    parent: int,
) -> None:
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    for other in others:  # inherited; with these open no worker would see the parent end
        other.close()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    unsaid, said_at = 0, 0.0

    def report(units: int) -> None:
        nonlocal unsaid, said_at
        unsaid += units
        if (now := time.monotonic()) - said_at > _SECONDS:
            connection.send((unsaid, None))
            unsaid, said_at = 0, now

    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        unsaid = 0
        try:
            outcome = (True, function(item, report))
        except Exception as error:
            error.add_note(f"In a worker:\n{traceback.format_exc()}")
            outcome = (False, _portable(error))
        try:
            connection.send_bytes(_pickled((unsaid, outcome)))
        except OSError:
            return


def _end_with(parent: int) -> None:
    """An orphan would keep the locks of what it writes."""
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(1)


def _pickled(answer: tuple[int, tuple[bool, Any]]) -> Any:
    try:
        return ForkingPickler.dumps(answer)
    except Exception as error:
        return ForkingPickler.dumps((answer[0], (False, _portable(error))))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where that can't go from process to process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            portable.add_note(note)
        return portable
    return error

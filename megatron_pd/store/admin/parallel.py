"""Jobs over the parts of a store, in several processes: progress as it comes, and a clean stop.

A job calls `report(n)` whenever it has done n more units of its work. That is also where it learns
that it must stop: on Ctrl-C or SIGTERM the caller's process asks every job to leave by an
exception, waits for them, and only then goes on with the interruption.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_pd.store.types import StoreError

__all__ = ["Progress", "run_jobs"]

Progress = Callable[[int], None]

_POLL_SECONDS = 0.1


def run_jobs[Job, Result](
    work: Callable[[Job, Progress], Result],
    jobs: Sequence[Job],
    workers: int,
    progress: Progress = lambda units: None,
) -> Iterator[tuple[Job, Result]]:
    """Yields (job, work(job, report)) for all jobs, in the order in which they get done.

    With one worker, or one job, everything happens in this process.

    Args:
        work: called in a child process, which inherits what it refers to; jobs and results are
            pickled.
        progress: called with the units that were reported since the last call.
    Raises:
        StoreError: a process died, or what `work` raised; the other jobs are stopped.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, work(job, progress)
        return
    # Forked, so that stores, corpora and indices need not be pickled or opened again.
    context = multiprocessing.get_context("fork")
    done_units, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), context, _start, (work, done_units, stop, os.getpid())
    )
    try:
        pending = {pool.submit(_run, job): job for job in jobs}
        seen = 0
        while pending:
            finished, _ = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            units = done_units.value
            progress(units - seen)
            seen = units
            for future in finished:
                yield pending.pop(future), future.result()
    except BrokenProcessPool:
        raise StoreError(
            "A worker process was killed, perhaps for lack of memory. What was written is "
            "kept: run the same command again, with fewer --workers."
        ) from None
    finally:
        with _deferred_signals():
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when the body is done: an interrupted `pool.shutdown` forgets its
    thread, which may then end with a lock that the interpreter waits for when it exits."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


class _Child:
    """What a worker process was started with."""

    work: Callable[[Any, Progress], Any]
    done_units: Any
    stop: Any
    unreported = 0
    last_report = 0.0


def _start(work: Callable[[Any, Progress], Any], done_units: Any, stop: Any, parent: int) -> None:
    # A terminal and Slurm signal every process of the job: the parent answers for all.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _Child.work, _Child.done_units, _Child.stop = work, done_units, stop
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """An orphan would keep the locks of its shards."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _run(job: Any) -> Any:
    try:
        return _Child.work(job, _report)
    finally:
        _publish()


def _report(units: int) -> None:
    _Child.unreported += units
    if time.monotonic() - _Child.last_report > _POLL_SECONDS:
        _publish()
        if _Child.stop.is_set():
            raise KeyboardInterrupt


def _publish() -> None:
    with _Child.done_units.get_lock():
        _Child.done_units.value += _Child.unreported
    _Child.unreported, _Child.last_report = 0, time.monotonic()

"""Jobs over the parts of a store, in several processes: progress as it comes, and a clean stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_pd.store.types import StoreError
from megatron_pd.workers import Report, Workers

__all__ = ["Progress", "run_jobs"]

Progress = Report


def run_jobs[Job, Result](
    work: Callable[[Job, Progress], Result],
    jobs: Sequence[Job],
    workers: int,
    progress: Progress = lambda units: None,
) -> Iterator[tuple[Job, Result]]:
    """Yields (job, work(job, report)) for all jobs, in the order in which they get done.

    With one worker, or one job, everything happens in this process. On an error, an interrupt, or
    when the iterator is closed, the other jobs are stopped by SIGKILL.

    Args:
        work: called in a child process, which inherits what it refers to; jobs and results are
            pickled. It calls `report(n)` whenever it has done n more units.
        progress: called with the units that were reported since the last call.
    Raises:
        StoreError: a process died; and what `work` raised.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, work(job, progress)
        return
    try:
        with Workers(work, min(workers, len(jobs))) as pool:
            waiting = list(reversed(range(len(jobs))))
            left = len(jobs)
            while left:
                while waiting and pool.idle:
                    number = waiting.pop()
                    pool.give(number, jobs[number])
                for answer in pool.answers():
                    progress(answer.units)
                    if answer.outcome is not None:
                        left -= 1
                        yield jobs[answer.number], answer.result()
    except ChildProcessError as error:
        raise StoreError(
            f"A worker process {error.strerror}. What was written is kept: run the same command "
            "again, with fewer --workers if it was the memory."
        ) from error

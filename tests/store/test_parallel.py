"""Jobs in several processes end, whoever is killed or interrupted, and whenever."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_pd.store import StoreError
from megatron_pd.store.admin.parallel import run_jobs


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(map(int, path.read_text().split()))


@pytest.fixture(autouse=True)
def it_ends() -> Iterator[None]:
    """A hang is a failure, not a test that runs for ever."""
    before = children()
    signal.alarm(120)
    yield
    signal.alarm(0)
    assert children() <= before


def test_results_and_progress_of_all_jobs() -> None:
    def work(job: int, report) -> tuple[int, bytes]:
        for _ in range(job):
            report(3)
            time.sleep(0.001)
        return os.getpid(), bytes(job * 10_000)

    jobs = list(range(40))
    for workers in (1, 3):
        told: list[int] = []
        found = dict(run_jobs(work, jobs, workers, told.append))
        assert sorted(found) == jobs and sum(told) == 3 * sum(jobs)
        assert all(len(result) == job * 10_000 for job, (_, result) in found.items())
        assert len({process for process, _ in found.values()}) == workers


def test_what_a_job_raises_stops_the_others() -> None:
    class Unpicklable(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def work(job: int, report) -> None:
        if job == 1:
            raise StoreError("what job 1 found")
        if job == 11:
            raise Unpicklable(1, 2)
        time.sleep(100)

    with pytest.raises(StoreError, match="what job 1 found"):
        list(run_jobs(work, [0, 1, 2], 3))
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        list(run_jobs(work, [0, 11], 2))


def test_a_worker_killed_at_any_moment_is_an_error() -> None:
    """Large results, so that many kills come amid one."""

    def work(job: int, report) -> bytes:
        report(1)
        return bytes(random.randint(0, 3 << 20))

    def kill_one(wait: float) -> None:
        time.sleep(wait)
        for victim in sorted(children() - before)[:1]:
            os.kill(victim, signal.SIGKILL)

    killed = 0
    for _ in range(40):
        before = children()
        killer = threading.Thread(target=kill_one, args=(random.random() / 20,))
        killer.start()
        try:
            assert len(list(run_jobs(work, list(range(40)), 2))) == 40
        except StoreError as error:
            assert "was killed by SIGKILL" in str(error)
            killed += 1
        killer.join()
    assert killed


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading, time
from megatron_pd.store.admin.parallel import run_jobs

def work(job, report):
    for _ in range(20):
        report(1)
        time.sleep(0.001)
    return bytes(job << 10)

def interrupt():
    time.sleep(float(sys.argv[1]))
    os.killpg(0, signal.SIGINT)

os.setpgid(0, 0)
try:
    threading.Thread(target=interrupt).start()
    while True:
        for job, _ in run_jobs(work, list(range(50)), 3):
            time.sleep(0.0005)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_at_any_moment_ends_all() -> None:
    """Also in the caller's own code, and while the workers start or leave."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(np.random.uniform(0, 0.6))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(10)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "")
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)

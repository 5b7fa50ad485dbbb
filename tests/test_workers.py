import errno
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest

from megatron_pd.workers import ordered_map


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers):
    def slow_square(number):
        time.sleep(random.random() / 200)
        return number, os.getpid(), b"x" * random.randint(0, 500_000)

    items = [(number, b"y" * random.randint(0, 500_000)) for number in range(60)]
    found = list(ordered_map(slow_square, items, workers))
    assert [item for item, _, _ in found] == items
    assert len({process for _, process, _ in found}) == workers
    assert list(ordered_map(slow_square, [], workers)) == []


def test_few_items_are_in_memory_however_slow_one_is():
    drawn = []

    def items():
        for number in range(200):
            drawn.append(number)
            yield number

    def work(number):
        time.sleep(0.2 if number == 10 else 0)
        return number

    ahead = [len(drawn) - number for number in ordered_map(work, items(), 3)]
    assert len(ahead) == 200
    assert max(ahead) <= 4 * 3 + 1


def test_errors_come_in_their_turn():
    def work(number):
        time.sleep(0.1 if number == 4 else 0)
        if number in (4, 6):
            raise ValueError(f"item {number}")
        return number

    found = []
    with pytest.raises(ValueError, match="item 4") as error:
        for number in ordered_map(work, range(100), 3):
            found.append(number)
    assert found == [0, 1, 2, 3]
    assert "test_workers.py" in error.value.__notes__[0]


def test_errors_of_the_items_come_out():
    def items():
        yield from range(5)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ordered_map(abs, items(), 2))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_an_error(workers, kill):
    def work(number):
        if number == 7:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), kill)
        return number

    with pytest.raises(ChildProcessError, match=f"was killed by {kill.name}") as error:
        list(ordered_map(work, range(100), workers))
    assert error.value.filename == "7"


def test_a_worker_without_memory_is_an_error():
    def work(number):
        return bytes(1 << 62)

    with pytest.raises(OSError, match="no memory was left for the worker") as error:
        list(ordered_map(work, [7], 2))
    assert (error.value.errno, error.value.filename) == (errno.ENOMEM, "7")


def test_a_worker_that_ends_is_an_error():
    with pytest.raises(ChildProcessError, match="ended with status 3"):
        list(ordered_map(os._exit, [3], 2))


def test_a_worker_that_is_killed_amid_its_result_is_an_error():
    """The other worker lives, and would keep a pipe that they share open for ever."""

    def work(number):
        if number == 0:  # its result is more than a socket holds
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(10 << 20)

    def items():
        yield from range(3)
        time.sleep(1)  # nobody reads results meanwhile
        yield 3

    with pytest.raises(ChildProcessError, match="SIGKILL"):
        list(ordered_map(work, items(), 2))


def test_a_killed_worker_that_waits_is_an_error():
    def items():
        yield os.getpid()
        time.sleep(0.2)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(1000):  # the other worker may take the next ones
            time.sleep(0.001)
            yield os.getpid()

    with pytest.raises(ChildProcessError, match="SIGKILL"):
        list(ordered_map(str, items(), 2))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_parent(stop):
    def work(number):
        os.kill(os.getpid(), stop)
        return number

    assert list(ordered_map(work, range(20), 2)) == list(range(20))


def test_workers_end_with_the_parent():
    """Killed, it cannot tell them."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        for _ in ordered_map(lambda _: os.write(writer, b"%d\n" % os.getpid()), range(100), 3):
            time.sleep(0.01)
        time.sleep(100)
    os.close(writer)
    with os.fdopen(reader) as lines:
        workers = {int(lines.readline()) for _ in range(90)}
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        lines.read()  # until every process that could write has ended
    assert len(workers) > 1


def test_an_early_end_leaves_no_process():
    results = ordered_map(lambda number: number, range(1000), 3)
    assert next(results) == 0
    assert len(children()) >= 3
    results.close()

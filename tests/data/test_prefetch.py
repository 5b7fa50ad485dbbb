"""Fetching ahead: earlier, and otherwise as without it."""

import threading
from collections.abc import Iterator

import pytest
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)

from megatron_pd.data.prefetch import Prefetched, prefetch


def test_the_next_item_is_fetched_while_this_one_is_used() -> None:
    fetched = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(fetched):
            event.set()
            yield number

    prefetched = Prefetched(items())
    assert next(prefetched) == 0
    assert fetched[1].wait(timeout=60)
    assert not fetched[2].is_set()  # one ahead is enough, and all that memory is taken for
    assert list(prefetched) == [1, 2]


def test_the_end_stays_the_end() -> None:
    prefetched = Prefetched(iter([1, 2]))
    assert list(prefetched) == [1, 2]
    assert list(prefetched) == []


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    prefetched = Prefetched(items())
    assert next(prefetched) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            next(prefetched)


def test_an_iterator_replays_what_was_taken_and_nothing_fetched_ahead() -> None:
    initialize_rerun_state_machine(mode=RerunMode.REPORT_DETERMINISM_STATS)
    try:
        iterator = RerunDataIterator(iter(range(9)))
        prefetch(iterator)
        prefetch(iterator)  # again at every micro-batch
        assert [next(iterator), next(iterator)] == [0, 1]
        assert iterator.state_dict()["saved_microbatches"] == [0, 1]
        iterator.rewind()
        assert [next(iterator), next(iterator)] == [0, 1]
        iterator.advance()
        assert [next(iterator) for _ in range(7)] == list(range(2, 9))
    finally:
        destroy_rerun_state_machine()

"""What all tests share."""

import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/assets/losses/ anew instead of comparing with it",
    )


def pytest_sessionstart() -> None:
    """A run in the background, by nohup or a batch system, ignores these signals; what the tests
    start and interrupt must not inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

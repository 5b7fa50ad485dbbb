"""The `megatron-pd` command: one file per subcommand.

A subcommand's module offers `HELP`, `add_arguments(parser)` and `run(args) -> int`. Those that run
a Megatron model (`dump`, `evaluate`) take Megatron's own flags instead, read by Megatron's parser
from `sys.argv`; they offer `HELP` and `main()`, as `convert` does for `convert from-megatron`.
"""

import argparse
import importlib
import signal
import sys
from typing import NoReturn

from megatron_pd.errors import reporting_errors, stop_on_sigterm

__all__ = ["main", "script"]

_COMMANDS = (
    "train-tokenizer",
    "preprocess",
    "inspect",
    "verify",
    "stats",
    "merge",
    "split",
    "recode",
    "collect",
    "convert",
    "import-hf",
    "export-hf",
    "plan",
    "rehearse",
    "stage",
)
_MEGATRON_COMMANDS = ("dump", "evaluate")


def script() -> NoReturn:
    """Entry point of the `megatron-pd` script."""
    try:
        status = main()
    finally:  # what is left are other libraries' exit hooks, where a stop would be a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(status)


def main() -> int:
    """One command, as `sys.argv` says. Returns the process's exit status."""
    with reporting_errors(unexpected=True):
        stop_on_sigterm()
        return _main()


def _main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command in _MEGATRON_COMMANDS:
        sys.argv = [f"{sys.argv[0]} {command}", *sys.argv[2:]]
        return _module(command).main()
    if sys.argv[1:3] == ["convert", "from-megatron"]:
        sys.argv = [" ".join(sys.argv[:3]), *sys.argv[3:]]
        return _module("convert").main()
    parser = argparse.ArgumentParser(
        prog="megatron-pd", description="Pre-training distillation for Megatron."
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name in _COMMANDS:
        module = _module(name)
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    for name in _MEGATRON_COMMANDS:
        subparsers.add_parser(name, help=_module(name).HELP)
    args = parser.parse_args()
    return args.run(args)


def _module(command: str):
    return importlib.import_module(f"megatron_pd.cli.{command.replace('-', '_')}")

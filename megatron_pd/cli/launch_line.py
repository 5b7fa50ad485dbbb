"""The launch line of `megatron-pd plan` and `megatron-pd rehearse`."""

import argparse
import logging
import shlex
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_pd.cluster.launch_line import LaunchLine

__all__ = ["add_launch_line", "launch_line_of", "prepare_for_megatron"]


def add_launch_line(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "line",
        nargs=argparse.REMAINDER,
        metavar="torchrun … -m megatron_pd.pretrain …",
        help="the launch line, last; without it, standard input, as from `DRY_RUN=1 "
        "examples/pretrain_gpt_pd.sh`",
    )


def launch_line_of(args: argparse.Namespace) -> "LaunchLine":
    from megatron_pd.cluster.launch_line import parse_launch_line

    return parse_launch_line(args.line or shlex.split(sys.stdin.read()))


def prepare_for_megatron() -> None:
    """Before Megatron is imported: this machine's device, and no notes on what it lacks."""
    from megatron_pd.megatron import cpu

    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    cpu.install()

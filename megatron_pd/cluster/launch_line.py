"""A launch line, as `DRY_RUN=1 examples/pretrain_gpt_pd.sh` prints it, taken apart."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_pd.errors import UserError

__all__ = ["LaunchLine", "parse_launch_line"]

_MODULE = "megatron_pd.pretrain"


@dataclass(frozen=True)
class LaunchLine:
    nodes: int
    processes_per_node: int
    flags: tuple[str, ...]
    """Megatron's and the --pd-* flags."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"torchrun's part of the launch line: {message}.")


def parse_launch_line(words: Sequence[str]) -> LaunchLine:
    """`torchrun <its flags> -m megatron_pd.pretrain <flags>`, or the same by `python -m`.

    Raises:
        UserError: it is no such line, or the numbers of nodes and processes are not fixed.
    """
    if _MODULE not in words:
        raise UserError(
            f"The launch line doesn't run -m {_MODULE}: give what "
            "`DRY_RUN=1 examples/pretrain_gpt_pd.sh` prints, or pipe it in."
        )
    module = words.index(_MODULE)
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nnodes", "--nodes", type=int, default=1)
    parser.add_argument("--nproc-per-node", "--nproc_per_node", type=int, default=1)
    launcher, _ = parser.parse_known_args(list(words[:module]))
    return LaunchLine(launcher.nnodes, launcher.nproc_per_node, tuple(words[module + 1 :]))

"""`megatron-pd rehearse`: a launch line tried on one CPU, with its own data, stores and layout."""

import argparse
import contextlib
import socket
import sys

from megatron_pd.cli.launch_line import add_launch_line, launch_line_of, prepare_for_megatron

HELP = "Find the mistakes of a launch line before its GPUs are waiting."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-epochs",
        type=float,
        default=1.0,
        help="how often the run may see a token; default: 1",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=400.0,
        help="TFLOP/s that a GPU reaches in training, by which reading must keep up; default: 400",
    )
    parser.add_argument("--plot", help="write α and the learning rate to this PNG")
    add_launch_line(parser)


def run(args: argparse.Namespace) -> int:
    prepare_for_megatron()
    from megatron_pd.cluster.assumptions import Assumptions
    from megatron_pd.cluster.rehearse import Rehearsal
    from megatron_pd.megatron.launch import args_at_scale

    line = launch_line_of(args)
    rehearsal = Rehearsal(
        args_at_scale(line.flags, line.world_size),
        line,
        Assumptions(tflops=args.tflops),
        args.max_epochs,
        args.plot,
    )
    mistakes = 0
    checks = rehearsal.checks()
    while True:
        with contextlib.redirect_stdout(sys.stderr):  # Megatron's own prints
            check = next(checks, None)
        if check is None:
            break
        print(f"{'ok     ' if check.mistake is None else 'MISTAKE'} {check.name}")
        for text in check.found if check.mistake is None else [check.mistake]:
            print(f"        {text}", flush=True)
        mistakes += check.mistake is not None
    if mistakes:
        print(f"mistakes: {mistakes}, on {socket.gethostname()}. Mend them and rehearse again.")
        return 1
    print(f"no mistake found, on {socket.gethostname()}")
    return 0

"""`megatron-pd plan`: what a launch line costs, before it runs."""

import argparse
import json
from typing import TYPE_CHECKING

from megatron_pd.cli.launch_line import add_launch_line, launch_line_of, prepare_for_megatron

if TYPE_CHECKING:
    from megatron_pd.cluster.plan import Figure

HELP = "FLOPs, memory, steps, bytes and worth of a launch line, as an estimate."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_pd.cluster.assumptions import Assumptions
    from megatron_pd.options import add_options

    add_options(parser, Assumptions, "plan")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_launch_line(parser)


def run(args: argparse.Namespace) -> int:
    prepare_for_megatron()
    from megatron_pd.cluster.assumptions import Assumptions
    from megatron_pd.cluster.plan import plan
    from megatron_pd.megatron.launch import args_at_scale
    from megatron_pd.options import given_options

    assumed = Assumptions(**given_options(args, Assumptions, "plan"))
    line = launch_line_of(args)
    figures = plan(args_at_scale(line.flags, line.world_size, assumed.vocab_size), line, assumed)
    if args.json:
        print(json.dumps({f"{f.section}: {f.name}": f.value for f in figures}))
        return 0
    section = None
    for figure in figures:
        if figure.section != section:
            section = figure.section
            print(section)
        print(f"  {figure.name:38} {_shown(figure):>18}  {figure.note}".rstrip())
    return 0


def _shown(figure: "Figure") -> str:
    value, unit = figure.value, figure.unit
    if value is None:
        return "no number does"
    if unit in ("nats", "students", "h"):
        return f"{value:,.4g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    if isinstance(value, int) and not unit:
        return f"{value:,}"
    for prefix, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3)):
        if value >= 10**power:
            return f"{value / 10**power:,.4g} {prefix}{unit}"
    return f"{value:,.4g} {unit}".rstrip()

"""What the benchmarks share: arguments, taking turns, clock and memory, machine, tables, reports.

Imports torch but nothing of megatron_pd, so that gpu_check.py can use it before anything is built.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Clock",
    "Report",
    "Spread",
    "alternate",
    "command_line",
    "describe_machine",
    "fastest",
    "markdown_table",
    "megatron_on",
    "parse",
    "parser",
    "peak_memory",
    "processor",
    "spreads",
]

MEBIBYTE = 2**20


# --- arguments ------------------------------------------------------------------------------------


def parser(description: str, *, repeats: int, device: str | None = None) -> argparse.ArgumentParser:
    """The flags of every benchmark, and with `device`, the default of --device, also those of the
    ones that run on either a CPU or a GPU."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="small: a minute or two on two cores")
    result.add_argument("--repeats", type=int, default=repeats, help="default: %(default)s")
    result.add_argument("--output", type=Path, help="write what is printed to this file as well")
    result.add_argument("--json", type=Path, help="write the figures to this file")
    if device is not None:
        result.add_argument(
            "--device", choices=["cpu", "cuda"], default=device, help="default: %(default)s"
        )
        result.add_argument("--threads", type=int, help="of the CPU")
    return result


def parse(arguments: argparse.ArgumentParser, quick: Mapping[str, Any]) -> argparse.Namespace:
    """The options of this process. `quick` are the defaults under --quick; flags given win."""
    if arguments.parse_known_args()[0].quick:
        arguments.set_defaults(**quick)
    options = arguments.parse_args()
    if options.repeats < 1:
        arguments.error(f"--repeats is {options.repeats}: give 1 or more")
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        arguments.error("torch sees no GPU: check nvidia-smi, or use --device cpu")
    return options


def command_line() -> str:
    """This process's command for a report, without the folders of this machine."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[2])
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", str(script), *words])


# --- taking turns ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """One figure over the repeats."""

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def max(self) -> float:
        return max(self.values)


def alternate[Name: Hashable](
    contenders: Mapping[Name, Callable[[], Mapping[str, float]]], repeats: int
) -> dict[Name, dict[str, Spread]]:
    """Run every contender `repeats` times, in turns, so that what else the machine does meets all.

    A run returns its figures by name, the same ones each time; so does this, for each contender.
    """
    runs: dict[Name, list[Mapping[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            runs[name].append(run())
    return {
        name: {figure: Spread(tuple(run[figure] for run in found)) for figure in found[0]}
        for name, found in runs.items()
    }


def fastest(action: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    """What the fastest of `repeats` calls takes by the clock."""

    def run() -> dict[str, float]:
        start = clock()
        action()
        return {"time": clock() - start}

    return alternate({"": run}, repeats)[""]["time"].min


def spreads(figures: Mapping[str, Spread]) -> dict[str, list[float]]:
    """[min, median, max] of each figure, for JSON."""
    return {name: [each.min, each.median, each.max] for name, each in figures.items()}


# --- clock and memory -----------------------------------------------------------------------------


class Clock:
    """Milliseconds, once the device has done what it was given.

    `seconds` is what they are counted by: the clock's time, or time.process_time for CPU time.
    """

    def __init__(self, device: str, seconds: Callable[[], float] = time.perf_counter) -> None:
        self._cuda = device == "cuda"
        self._seconds = seconds

    def __call__(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return 1e3 * self._seconds()


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """The block's highest memory use above that at its start, bytes, as the one item of the list:
    of the GPU, or resident of this process."""
    peak: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - before)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide new use
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the kernel's high-water mark starts again from here
        before = _status_bytes("VmRSS")
        yield peak
        peak.append(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# --- the machine ----------------------------------------------------------------------------------


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def describe_machine(device: str) -> dict[str, str]:
    """What a report says about the machine."""
    machine = {"torch": torch.__version__, "Python": platform.python_version()}
    if device == "cpu":
        return {
            "device": f"CPU, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
            "note": "not run on a GPU, so nothing here is about the CUDA kernels",
            **machine,
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory // MEBIBYTE} MiB",
        "CUDA": str(torch.version.cuda),
        **machine,
    }


@contextlib.contextmanager
def megatron_on(device: str) -> Iterator[None]:
    """Megatron's stack on a device, as the one rank of a job."""
    import torch.distributed as dist

    from megatron_pd.errors import reporting_errors
    from megatron_pd.megatron import cpu

    os.environ["MEGATRON_PD_DEVICE"] = device
    with reporting_errors():
        cpu.install()
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- reports --------------------------------------------------------------------------------------


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


class Report:
    """Prints lines as they are found, and keeps them for --output."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self._lines.append(text)

    def save(self, options: argparse.Namespace, figures: Any) -> None:
        """Write what was printed to --output, and the figures to --json."""
        if options.output:
            options.output.write_text("\n".join(self._lines) + "\n")
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")

"""Checks and measures the kernels on this machine's GPU, in one command of under eight minutes.

    python tools/gpu_check.py                       # report in gpu-check/report.md and report.json
    python tools/gpu_check.py --device cpu --small  # the same stages, small, where there is no GPU

Needed: a GPU, torch, nvcc of torch's CUDA version, pytest and hypothesis; no internet, and the
project need not be installed. Stages, each in a process of its own:

    build      the extension, for this GPU
    tests      every test of the operators, on the device
    loss       benchmarks/bench_loss.py: K = 0, 50, 100, two vocabularies, bf16 and fp32, beside
               Megatron's losses and a dense one, with memory and the share of the copy bandwidth
    output layer   benchmarks/bench_output_layer.py: the output layer and the losses, whole and in
               chunks, beside the layer's three matrix products
    gpt step   benchmarks/bench_gpt_step.py: a Megatron GPT step, three losses
    training   a student's training and a teacher's dump, beside the same on the CPU
    memcheck, racecheck   some of the tests under compute-sanitizer, where it is installed

Training, Megatron's losses, the output layer and the GPT step need megatron-core (bring its wheel
and put it on PYTHONPATH); where it can't be imported they are left out and the report says so. The
exit status is 0 if no stage failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import describe_machine, markdown_table

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Stage:
    """What one stage did, and its last words or the reason."""

    name: str
    outcome: str
    """passed, failed, stopped (the time was over) or skipped"""

    seconds: float = 0.0
    note: str = ""
    data: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Plan:
    """What is run where: sizes of the benchmarks and the tests that run."""

    tests: list[str]
    loss: list[str]
    output_layer: list[str]
    gpt_step: list[str]


FULL = Plan(
    tests=["tests/ops"],
    loss="--rows 8192 --vocab-size 131072 151552 --k 50 100 --repeats 10".split(),
    output_layer=[],
    gpt_step="--repeats 5".split(),
)
SMALL = Plan(
    tests=["tests/ops/test_sparse_log_softmax.py", "-k", "special or strided"],
    loss="--rows 8 --vocab-size 1000 1001 --k 5 10 --repeats 1".split(),
    output_layer="--rows 32 --hidden-size 16 --vocab-size 1000 --k 5 --repeats 1".split(),
    gpt_step=(
        "--layers 1 --hidden-size 32 --vocab-size 1024 --seq-length 32 --k 5 --repeats 1"
    ).split(),
)
# Small enough for the sanitizer's slowness, and with it every loop of the kernels.
SANITIZED_TESTS = ["tests/ops", "-k", "any_vocabulary or special_values or composes"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=int, default=8 * 60, metavar="SECONDS", help="default: %(default)s"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU: check nvidia-smi, or use --device cpu.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    options.output = options.output.resolve()
    machine = describe_machine(options.device)
    stages = []
    for stage in run_stages(options):
        stages.append(stage)
        print(f"{stage.name}: {stage.outcome} in {stage.seconds:.0f} s. {stage.note}", flush=True)
        write_report(options.output, machine, stages)  # a later crash or Ctrl-C keeps what is there
    print((options.output / "report.md").read_text())
    return int(any(stage.outcome in ("failed", "stopped") for stage in stages))


def run_stages(options: argparse.Namespace) -> Iterator[Stage]:
    plan = SMALL if options.small else FULL
    runner = Runner(options)
    yield (build := runner.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"]))
    if build.outcome == "failed":
        return
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    lacking = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    no_tests = f"{' and '.join(lacking)} can't be imported." if lacking else ""
    no_megatron = ""
    if importlib.util.find_spec("megatron") is None:
        no_megatron = "megatron-core can't be imported: put its wheel on PYTHONPATH."
    no_gpu = "It is for a GPU." if options.device == "cpu" else ""
    no_sanitizer = "" if find_compute_sanitizer() else "compute-sanitizer isn't installed."

    yield runner.tests("tests", [*pytest, *plan.tests], unless=no_tests)
    yield runner.benchmark("loss", "bench_loss.py", plan.loss)
    yield runner.benchmark(
        "output layer", "bench_output_layer.py", plan.output_layer, unless=no_megatron
    )
    yield runner.benchmark("gpt step", "bench_gpt_step.py", plan.gpt_step, unless=no_megatron)
    training = [*pytest, "tests/training/test_gpu.py"]
    yield runner.tests("training", training, unless=no_gpu or no_tests or no_megatron)
    for tool in ("memcheck", "racecheck"):
        command = [str(find_compute_sanitizer()), "--tool", tool, "--error-exitcode", "9"]
        command += ["--target-processes", "all", *pytest, *SANITIZED_TESTS]
        # Without torch's own pool every tensor is an allocation of which the tool knows the end.
        pool = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield runner.tests(tool, command, unless=no_gpu or no_sanitizer or no_tests, **pool)


def find_compute_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


class Runner:
    """Runs commands at the project's root, their output on the terminal as well."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.output = options.device, options.output
        self.time_limit = options.time_limit
        self.deadline = time.monotonic() + self.time_limit
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if self.device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            self.environment |= {
                "MEGATRON_PD_BUILD_CUDA": "1",
                "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
            }

    def tests(self, name: str, command: list[str], unless: str = "", **environment: str) -> Stage:
        """Tests in the checked mode, which waits for the GPU and so isn't for benchmarks."""
        if self.device == "cuda":
            environment |= {"MEGATRON_PD_TEST_DEVICE": "cuda", "MEGATRON_PD_CHECK_INPUTS": "1"}
        return self.run(name, command, unless, **environment)

    def run(self, name: str, command: list[str], unless: str = "", **environment: str) -> Stage:
        """`unless` is the reason to skip the stage."""
        if unless:
            return Stage(name, "skipped", note=unless)
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        left = self.deadline - start
        if left <= 0:
            return Stage(name, "skipped", note=f"The {self.time_limit} seconds were over.")
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | self.environment | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=left,
            )
            output, note = done.stdout, ""
            outcome = "passed" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired as error:
            output, outcome = error.stdout or b"", "stopped"
            note = f"The {self.time_limit} seconds were over. "
        lines = output.decode(errors="replace").splitlines()
        print("\n".join(lines), flush=True)
        last = next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), "")
        return Stage(name, outcome, time.monotonic() - start, note + last)

    def benchmark(self, name: str, script: str, arguments: list[str], unless: str = "") -> Stage:
        """A script of this folder that writes what it measured to `--json FILE`."""
        results = self.output / f"{script}.json"
        results.unlink(missing_ok=True)
        command = [
            sys.executable,
            f"tools/benchmarks/{script}",
            "--device",
            self.device,
            *arguments,
        ]
        stage = self.run(name, [*command, "--json", str(results)], unless)
        if results.exists():
            stage.data = json.loads(results.read_text())
            results.unlink()
        return stage


# --- the report -----------------------------------------------------------------------------------


def write_report(folder: Path, machine: dict[str, str], stages: list[Stage]) -> None:
    report = {"machine": machine, "stages": [asdict(stage) for stage in stages]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text("\n".join(markdown(machine, stages)) + "\n")


def markdown(machine: dict[str, str], stages: list[Stage]) -> Iterator[str]:
    yield "# Check of the kernels\n"
    yield from (f"- {name}: {value}" for name, value in machine.items())
    yield ""
    yield from markdown_table(
        ["stage", "outcome", "seconds", ""],
        ([s.name, s.outcome, f"{s.seconds:.0f}", s.note] for s in stages),
    )
    sections: dict[str, Callable[[Any], Iterator[str]]] = {
        "loss": loss_section,
        "output layer": output_layer_section,
        "gpt step": gpt_section,
    }
    for stage in stages:
        if stage.data is not None:
            yield from sections[stage.name](stage.data)


def loss_section(shapes: list[dict[str, Any]]) -> Iterator[str]:
    for shape in shapes:
        size = shape["logits_bytes"]
        bandwidth = shape["copy_bytes_per_second"]
        forward, backward = shape["operators_ms"]
        shares = shape["operators_share_of_copy_bandwidth"]
        yield (
            f"\n## Loss, {shape['rows']} × {shape['vocab_size']}, {shape['dtype']}\n\n"
            f"Logits {size / 1e9:.3f} GB; a copy moves {bandwidth / 1e9:.0f} GB/s, read and "
            f"written. Operators alone: forward {forward:.3f} ms ({shares[0]:.0%} of the copy "
            f"bandwidth), backward {backward:.3f} ms ({shares[1]:.0%}).\n"
        )
        yield from markdown_table(
            ["", "K", "forward ms", "backward ms", "both ms", "peak with the logits, GB"],
            (
                [
                    row["name"],
                    str(row["k"]),
                    f"{row['forward_ms']:.2f}",
                    f"{row['backward_ms']:.2f}",
                    f"{row['forward_ms'] + row['backward_ms']:.2f}",
                    f"{(size + row['peak_bytes']) / 1e9:.3f}",
                ]
                for row in shape["contenders"]
            ),
        )


def output_layer_section(report: dict[str, Any]) -> Iterator[str]:
    options = report["options"]
    yield (
        f"\n## Output layer and losses, {options['rows']} tokens, {options['hidden_size']} × "
        f"{options['vocab_size']}, K = {options['k']}\n"
    )
    yield from markdown_table(
        ["", "forward ms", "backward ms", "over the three products", "peak, GB"],
        (
            [
                row["name"],
                f"{row['forward_ms']:.1f}",
                f"{row['backward_ms']:.1f}",
                f"{row['over_three_products']:.3f}",
                f"{row['peak_bytes'] / 1e9:.3f}",
            ]
            for row in report["contenders"]
        ),
    )


def gpt_section(report: dict[str, Any]) -> Iterator[str]:
    options = report["options"]
    yield (
        f"\n## One step of a Megatron GPT, {options['layers']} layers, hidden "
        f"{options['hidden_size']}, vocabulary {options['vocab_size']}, {report['tokens']} tokens, "
        f"K = {options['k']}, bf16\n"
    )
    yield from markdown_table(
        ["", "forward ms", "backward ms", "step ms", "tokens/s", "peak beyond the state, GB"],
        (
            [
                row["name"],
                f"{row['forward_ms']:.1f}",
                f"{row['backward_ms']:.1f}",
                f"{row['step_ms']:.1f}",
                f"{1e3 * report['tokens'] / row['step_ms']:.0f}",
                f"{row['peak_bytes'] / 1e9:.3f}",
            ]
            for row in report["contenders"]
        ),
    )


if __name__ == "__main__":
    sys.exit(main())

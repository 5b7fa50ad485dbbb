"""Which tail policy and α: the demo's student under each, on one teacher and its logit stores.

    python tools/experiments/compare_tails.py                          every setting, one seed
    python tools/experiments/compare_tails.py --seeds 3 --settings lm-only pd-star ghost-wsd-0.9

Trains the demo's teacher, dumps its rows (top-0.95-50, and 50 random draws), trains the demo's
student once for each setting and seed, and writes held-out loss and calibration error (ECE) to
build/tails/seed-N/report.md. A seed is the student's: its first weights and the order of its data.
A stopped comparison goes on where it was; finished trainings are not repeated.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import demo
from demo import STUDENT, Demo, StageError
from rich.progress import Progress

demo.ROOT = Path("build/tails")
DRAWS = 50
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


def _settings() -> dict[str, str]:
    """Name → flags. α schedules follow the learning rate's warmup, stable and decay phases."""
    settings = {"lm-only": "", "pd-star": "--pd-recipe pd-star"}
    for tail in ("renormalize", "raw", "ghost", "to-label"):
        for alpha in (0.5, 0.9):
            settings[f"{tail}-wsd-{alpha}"] = (
                f"--pd-tail {tail} --pd-alpha {alpha} --pd-alpha-schedule wsd"
            )
    for tail in ("renormalize", "ghost", "to-label"):
        settings[f"{tail}-constant-0.9"] = f"--pd-tail {tail} --pd-alpha 0.9"
    settings["decoupled-tau2-wsd-0.9"] = (
        "--pd-tail decoupled --pd-temperature 2 --pd-alpha 0.9 --pd-alpha-schedule wsd"
    )
    settings["sampled-wsd-0.9"] = (
        "--pd-tail sampled --pd-alpha 0.9 --pd-alpha-schedule wsd --pd-store {sampled}"
    )
    return settings


SETTINGS = _settings()


class Comparison(Demo):
    """The demo's stages up to the teacher's store, one store more, then a student per trial."""

    def _stages(self):
        for name, command in super()._stages():
            yield name, command
            if name.startswith("dump"):
                truncation = command.index("--dump-top-p")
                sampled = [*command[:truncation], *command[truncation + 4 :]]
                sampled += ["--dump-sampled", str(DRAWS), "--dump-store", self.path("sampled.pd")]
                yield "dump random draws", sampled
                return

    def trial(self, name: str, seed: int) -> dict:
        """Train and evaluate one student; its figures."""
        student = f"{name}-seed-{seed}"
        figures = Path(self.path(f"{student}.json"))
        if not figures.exists():
            flags = SETTINGS[name].format(sampled=self.path("sampled.pd")).split()
            training = self._train(student, "student", STUDENT)
            training = training[training.index("megatron_pd.pretrain") + 1 :]
            batch = ["--micro-batch-size", str(demo.GLOBAL_BATCH)]
            self.run_forked(
                "megatron_pd.pretrain", [*training, *batch, "--seed", str(seed), *flags], student
            )
            evaluation = [
                *("--load", self.path(f"checkpoints/{student}")),
                *("--data-path", self.path("heldout"), "--micro-batch-size", "32"),
                *("--evaluate-output", str(figures)),
            ]
            self.run_forked("megatron_pd.evaluate.loss", evaluation, f"evaluate-{student}")
        return json.loads(figures.read_text())

    def run_forked(self, module: str, argv: list[str], name: str) -> None:
        """Run one command as one process, of the environment that `ENVIRONMENT` makes."""
        log = self.logs / f"{name}.log"
        process = FORKS.Process(target=_main_of, args=(module, argv, log))
        process.start()
        process.join()
        if process.exitcode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise StageError(f"{name} failed; the end of {log}:\n{tail}")


# Megatron takes ten seconds to import: once, in a server that every trial is forked from.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megatron_pd.pretrain", "megatron_pd.evaluate.loss"])


def _main_of(module: str, argv: list[str], log: Path) -> None:
    """The life of a forked process: one rank of one command, its output in `log`."""
    import importlib

    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["MASTER_PORT"] = str(_free_port())
    sys.argv = [module, *argv]
    sys.exit(importlib.import_module(module).main())


def _free_port() -> int:
    """A port below those that the system gives out by itself, which another trial could get."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the data split and the teacher")
    parser.add_argument("--seeds", type=int, default=1, help="students for each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="students at a time, one process each")
    options = parser.parse_args()
    comparison = Comparison(options.seed)
    try:
        comparison.run()
        os.environ.update(ENVIRONMENT)
        trials = [(name, seed) for seed in range(1, options.seeds + 1) for name in options.settings]
        with Progress() as progress, ThreadPoolExecutor(options.jobs) as pool:
            task = progress.add_task("students", total=len(trials))
            for done in as_completed([pool.submit(comparison.trial, *trial) for trial in trials]):
                done.result()
                progress.advance(task)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = _report(comparison)
    (comparison.folder / "report.md").write_text(report)
    print(report)
    return 0


def _report(comparison: Comparison) -> str:
    """Every trial that has been run, as a table of the seeds' figures."""
    results: dict[str, dict[int, dict]] = {name: {} for name in SETTINGS}
    for name in SETTINGS:
        for path in comparison.folder.glob(f"{name}-seed-*.json"):
            results[name][int(path.stem.rpartition("-")[2])] = json.loads(path.read_text())
    lines = [
        "| setting | seeds | held-out LM loss | less than LM only by | ECE |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, by_seed in results.items():
        seeds = sorted(by_seed)
        loss = {seed: by_seed[seed]["lm_loss"] for seed in seeds}
        gains = [
            results["lm-only"][seed]["lm_loss"] - loss[seed]
            for seed in seeds
            if seed in results["lm-only"]
        ]
        if seeds:
            lines.append(
                f"| {name} | {', '.join(map(str, seeds))} | {_figures(loss.values())} | "
                f"{_figures(gains)} | {_figures(by_seed[seed]['ece'] for seed in seeds)} |"
            )
    return "\n".join(lines) + "\n"


def _figures(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())

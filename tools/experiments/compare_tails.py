"""Which tail policy and α: a small student under each, on one teacher and its logit stores.

    python tools/experiments/compare_tails.py                          every setting, one seed
    python tools/experiments/compare_tails.py --seeds 3 --settings lm-only pd-star ghost-wsd-0.9

Trains a small teacher, dumps its rows (top-0.95-50, and 50 random draws), trains a smaller
student once for each setting and seed, and writes held-out loss and calibration error (ECE) to
build/tails/seed-N/report.md. A seed is the student's: its first weights and the order of its data.
A stopped comparison goes on where it was; finished trainings are not repeated.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from small_teacher import (
    ROOT,
    Runner,
    SmallTeacher,
    Stage,
    run_experiment,
    sampled_store,
    teacher_stages,
)


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
    settings["sampled-wsd-0.9"] = "--pd-tail sampled --pd-alpha 0.9 --pd-alpha-schedule wsd"
    return settings


SETTINGS = _settings()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the data split and the teacher")
    parser.add_argument("--seeds", type=int, default=1, help="students for each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="students at a time, one process each")
    options = parser.parse_args()
    demo = SmallTeacher(options.seed, ROOT)
    trials = [(name, seed) for seed in range(1, options.seeds + 1) for name in options.settings]
    return run_experiment(demo, lambda runner: compare(demo, runner, trials, options.jobs))


def compare(
    demo: SmallTeacher, runner: Runner, trials: Sequence[tuple[str, int]], jobs: int
) -> None:
    """Run every (setting, seed) that has no figures yet; write and print the report."""
    runner.run(teacher_stages(demo))
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train_and_evaluate, demo, runner, *trial): trial for trial in trials}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                name, seed = futures[future]
                loss = future.result()["lm_loss"]
                print(f"[{number}/{len(trials)}] {name}, seed {seed}: {loss:.3f}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    text = report(demo)
    (demo.folder / "report.md").write_text(text)
    print(text)


def train_and_evaluate(demo: SmallTeacher, runner: Runner, name: str, seed: int) -> dict[str, Any]:
    """One student's figures on the held-out files."""
    student = f"{name}-seed-{seed}"
    figures = Path(demo.path(f"{student}.json"))
    if not figures.exists():
        flags = flags_of(demo, name, seed)
        runner.run_stage(demo.training_stage(student, student, demo.student, *flags, processes=1))
        runner.run_stage(Stage(f"evaluate-{student}", demo.evaluation(student, processes=1)))
    return json.loads(figures.read_text())


def flags_of(demo: SmallTeacher, name: str, seed: int) -> list[str]:
    """What a setting adds to the flags of the demo's student."""
    flags = ["--seed", str(seed), *SETTINGS[name].split()]
    if "sampled" in flags:
        flags += ["--pd-store", sampled_store(demo)]
    return flags


def report(demo: SmallTeacher) -> str:
    """Every trial that has been run, as a table of the seeds' figures."""
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in SETTINGS}
    for name in SETTINGS:
        for path in demo.folder.glob(f"{name}-seed-*.json"):
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

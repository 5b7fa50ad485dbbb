"""The demo's result: figures, a table, Markdown, and a plot of the training curves."""

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from demo.runner import Runner
from demo.stages import DISTILLATION, Demo
from megatron_pd.store import LogitStore

__all__ = [
    "Curves",
    "collect_figures",
    "markdown",
    "plot_curves",
    "read_scalars",
    "step_and_wait",
    "summary",
    "write_report",
]

COLORS = ("tab:gray", "tab:blue", "tab:red")

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""TensorBoard's scalars of a run: name → (steps, values)."""


def write_report(demo: Demo, runner: Runner) -> None:
    """Write report.json, report.md and the loss curves to the demo's folder and, for the latest
    seed, to its root; print the table."""
    figures = collect_figures(demo, runner)
    curves = {
        model: read_scalars(demo.folder / "tensorboard" / model)
        for model in demo.models
        if model != "teacher"
    }
    for folder in (demo.folder, demo.root):
        (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
        (folder / "report.md").write_text(markdown(figures))
        plot_curves(curves, figures, folder / "loss-curves.png")
    console = Console(width=100)
    console.print(summary(figures))
    for model, text in figures["lines"].items():
        console.print(f"{model}: {text!r}", highlight=False, markup=False)
    console.print(
        f"\nPD* against LM only: {figures['gain_nats']:.3f} nats lower loss, from a store of "
        f"{figures['store_bytes_per_token']:.0f} bytes per token "
        f"({figures['mean_entries_per_token']:.1f} entries). {figures['seconds']['total']:.0f} s. "
        f"More in {demo.root}/report.md and {demo.root}/loss-curves.png."
    )


def collect_figures(demo: Demo, runner: Runner) -> dict[str, Any]:
    """What report.json has: losses in nats per token, bytes, milliseconds, seconds by stage."""
    results = {
        model: json.loads(Path(demo.path(f"{model}.json")).read_text()) for model in demo.models
    }
    store = LogitStore(demo.path("student.pd"))
    figures: dict[str, Any] = {
        "seed": demo.seed,
        "models": demo.models,
        "precision": "bf16" if demo.bf16 else "float32",
    }
    for model, result in results.items():
        figures[f"{model}_lm_loss"] = result["lm_loss"]
        figures[f"{model}_ece"] = result["ece"]
    figures["gain_nats"] = figures["student_lm_only_lm_loss"] - figures["student_pd_lm_loss"]
    figures["tokens"] = {
        "student": demo.tokens(demo.student),
        "held_out": results["teacher"]["tokens"],
        "store": store.num_rows,
    }
    figures["store_bytes"] = store.nbytes
    figures["store_bytes_per_token"] = store.nbytes / store.num_rows
    figures["mean_entries_per_token"] = store.num_entries / store.num_rows
    figures["milliseconds_per_step"], figures["of_them_waiting_for_rows"] = step_and_wait(
        runner.log_of(DISTILLATION).read_text()
    )
    lines = json.loads(Path(demo.path("lines.json")).read_text())
    figures["prompt"] = lines["prompt"]
    figures["lines"] = {
        name: lines["texts"][Path(demo.hugging_face(model)).name]
        for model, name in demo.models.items()
    }
    figures["seconds"] = {**runner.seconds, "total": round(sum(runner.seconds.values()), 1)}
    figures["versions"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "numpy", "transformers")},
    }
    return figures


def step_and_wait(log: str) -> tuple[float, float]:
    """Milliseconds of a step, and of the slower rank's wait for teacher logits in it.

    From what Megatron printed; the first interval, in which everything starts, is left out.
    """
    steps = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log)
    waits = re.findall(r"teacher-rows \.+: \([\d.]+, ([\d.]+)\)", log)
    step, wait = (np.mean(np.array(values[1:], np.float64)) for values in (steps, waits))
    return float(step), float(wait)


def summary(figures: Mapping[str, Any]) -> Table:
    """The table that the demo prints."""
    table = Table(title=f"Held-out files of the standard library, seed {figures['seed']}")
    for column in ("model", "LM loss (nats/token)", "calibration error (ECE)", "trained on"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in _rows(figures):
        table.add_row(*row)
    return table


def markdown(figures: Mapping[str, Any]) -> str:
    """report.md."""
    lines = [
        f"# Demo, seed {figures['seed']}, {figures['precision']}",
        "",
        "| model | LM loss (nats/token) | ECE | trained on |",
        "| --- | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in _rows(figures)),
        "",
        f"{figures['tokens']['held_out']:,} tokens of held-out files. PD* lowers the student's "
        f"held-out loss by {figures['gain_nats']:.4f} nats.",
        "",
        f"Logit store: {figures['store_bytes']:,} bytes, "
        f"{figures['store_bytes_per_token']:.1f} per token, "
        f"{figures['mean_entries_per_token']:.1f} entries per token.",
        "",
        f"A PD* step took {figures['milliseconds_per_step']:.0f} ms, at most "
        f"{figures['of_them_waiting_for_rows']:.2f} ms of it spent waiting for teacher logits "
        "(Megatron's timer `teacher-rows`).",
        "",
        "What each writes, found by transformers in the exported folders, after",
        "",
        *_code(figures["prompt"]),
        "",
        *(f"- {name}: `{text!r}`" for name, text in figures["lines"].items()),
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *(f"| {stage} | {seconds} |" for stage, seconds in figures["seconds"].items()),
        "",
        "![loss curves](loss-curves.png)",
        "",
    ]
    return "\n".join(lines)


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            name,
            f"{figures[f'{model}_lm_loss']:.4f}",
            f"{figures[f'{model}_ece']:.4f}",
            "–" if model == "teacher" else f"{figures['tokens']['student']:,} tokens",
        )
        for model, name in figures["models"].items()
    ]


def _code(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def plot_curves(curves: Mapping[str, Curves], figures: Mapping[str, Any], path: Path) -> None:
    """The students' training losses, the teacher's on held-out files, and KD loss and α of the
    distilled one, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (model, name), color in zip(figures["models"].items(), COLORS, strict=True):
        label = f"{name}: {figures[f'{model}_lm_loss']:.2f} on held-out files"
        if model == "teacher":
            left.axhline(figures["teacher_lm_loss"], color=color, linestyle=":", label=label)
            continue
        steps, losses = curves[model]["lm loss"]
        left.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        left.plot(steps, _smooth(losses), color=color, linewidth=2, label=label)
    left.set(title="LM loss in training", xlabel="iteration", ylabel="nats per token")
    every_loss = np.concatenate([curves[model]["lm loss"][1] for model in curves])
    left.set_ylim(top=np.quantile(every_loss, 0.96))  # the first steps would flatten the others
    left.legend(frameon=False)
    steps, losses = curves["student_pd"]["kd loss"]
    right.plot(steps, losses, color=COLORS[-1], alpha=0.2, linewidth=0.8)
    (kd,) = right.plot(steps, _smooth(losses), color=COLORS[-1], linewidth=2, label="KD loss")
    right.set(title="Distillation (student, PD*)", xlabel="iteration", ylabel="nats per token")
    weight = right.twinx()
    (alpha,) = weight.plot(
        *curves["student_pd"]["alpha"], color="dimgray", linestyle="--", label="α, its weight"
    )
    weight.set(ylabel="α", ylim=(0, 1.02))
    right.legend(handles=[kd, alpha], frameon=False, loc="center")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines["top"].set_visible(False)
        axes.margins(x=0.01)
    left.spines["right"].set_visible(False)
    weight.spines["top"].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _smooth(values: np.ndarray, window: int = 11) -> np.ndarray:
    """Each value's mean with its neighbours."""
    ones = np.ones(window)
    counts = np.convolve(np.ones(len(values)), ones, mode="same")
    return np.convolve(values, ones, mode="same") / counts


def read_scalars(folder: Path) -> Curves:
    """TensorBoard's scalars of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: (
            np.array([event.step for event in events.Scalars(name)]),
            np.array([event.value for event in events.Scalars(name)]),
        )
        for name in events.Tags()["scalars"]
    }

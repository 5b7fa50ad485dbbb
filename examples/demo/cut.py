"""`make demo-cut`: SmolLM2 without every second layer learns again, LM only and distilled.

The student starts from 15 of the teacher's 30 layers. LM only is trained with each of three
learning rates, and the one that is best on held-out files is PD's as well: what PD gains is over a
baseline that was tuned, on the very files that it is compared on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.runner import Runner
from demo.stages import Demo, ModelSize, Stage, script
from megatron_pd.store import LogitStore

__all__ = ["CutDemo", "markdown", "run"]

RATES = (3e-4, 6e-4, 1.2e-3)
STUDENT = ModelSize(layers=15, hidden=576, iterations=64, lr=RATES[0], decay_iterations=26)
RECIPES = {"PD*": "pd-star", "robust": "robust"}


@dataclass(frozen=True)
class CutDemo(Demo):
    """Stages of `make demo-cut`."""

    root: Path = Path("build/demo-cut")
    student: ModelSize = STUDENT
    student_tokens: int = 70_000

    @property
    def start(self) -> str:
        """The Hugging Face folder of the student before training."""
        return str(self.root / "every-second-layer")

    def first_stages(self) -> list[Stage]:
        """Up to LM only with each learning rate, and the figures of all models so far."""
        return [
            Stage("cut SmolLM2", script("smollm2.py", self.start, "--keep-every", "2")),
            *self.teacher_stages(),
            Stage("import the student into Megatron", self.imported(self.start, "start")),
            *(stage for rate in RATES for stage in self.student_stages(lm_only(rate), rate)),
            *(Stage(f"evaluate {model}", self.evaluation(model)) for model in ("teacher", "start")),
        ]

    def student_stages(self, model: str, rate: float, *flags: str) -> list[Stage]:
        """A student that goes on from the cut teacher, and its figures."""
        start = self.path("checkpoints/start")
        flags = ("--load", start, "--finetune", "--no-load-optim", "--no-load-rng", *flags)
        flags = ("--lr", str(rate), *flags)
        return [
            self.training_stage(f"train {model}", model, self.student, *flags),
            Stage(f"evaluate {model}", self.evaluation(model)),
        ]

    def architecture(self, size: ModelSize) -> list[str]:
        return ["--use-checkpoint-args"]


def lm_only(rate: float) -> str:
    return f"lm-only-{rate:g}"


def run(demo: CutDemo, runner: Runner) -> None:
    """Run all stages and write report.md and report.json to the demo's folder."""
    runner.run(demo.first_stages())
    found = {rate: loss_and_ece(demo, lm_only(rate)) for rate in RATES}
    best = min(RATES, key=lambda rate: found[rate][0])
    runner.run(
        [
            stage
            for recipe in RECIPES.values()
            for stage in demo.student_stages(recipe, best, "--pd-recipe", recipe)
        ]
    )
    store = LogitStore(demo.path("student.pd"))
    figures = {
        "seed": demo.seed,
        "precision": "bf16" if demo.bf16 else "float32",
        "tokens": demo.tokens(demo.student),
        "distinct_tokens": store.num_rows,
        "store_bytes_per_token": store.nbytes / store.num_rows,
        "best_rate": best,
        "models": {
            "SmolLM2-135M, the teacher": loss_and_ece(demo, "teacher"),
            "every second layer of it": loss_and_ece(demo, "start"),
            **{f"LM only, learning rate {rate:g}": found[rate] for rate in RATES},
            **{name: loss_and_ece(demo, recipe) for name, recipe in RECIPES.items()},
        },
        "seconds": {**runner.seconds, "total": round(sum(runner.seconds.values()), 1)},
    }
    (demo.folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (demo.folder / "report.md").write_text(markdown(figures))
    Console(width=100).print(markdown(figures), markup=False, highlight=False)


def loss_and_ece(demo: Demo, model: str) -> tuple[float, float]:
    result = json.loads(Path(demo.path(f"{model}.json")).read_text())
    return result["lm_loss"], result["ece"]


def markdown(figures: dict[str, Any]) -> str:
    """report.md."""
    models = figures["models"]
    base = models[f"LM only, learning rate {figures['best_rate']:g}"][0]
    gains = " and ".join(f"{name} {base - models[name][0]:.4f}" for name in RECIPES)
    lines = [
        "# SmolLM2 without every second layer",
        "",
        f"    make demo-cut SEED={figures['seed']}",
        "",
        f"{figures['tokens']:,} tokens of training each ({figures['distinct_tokens']:,} distinct), "
        f"{figures['precision']}, a store of {figures['store_bytes_per_token']:.1f} bytes a token. "
        "LM loss in nats a token and calibration error on files that no student saw.",
        "",
        "| model | LM loss | ECE |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {loss:.4f} | {ece:.4f} |" for name, (loss, ece) in models.items()),
        "",
        f"Nats below the best LM-only student, at its learning rate: {gains}.",
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *(f"| {stage} | {seconds} |" for stage, seconds in figures["seconds"].items()),
        "",
    ]
    return "\n".join(lines)

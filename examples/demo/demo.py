"""`make demo`: pre-training distillation from text to result, on two CPU processes.

Real text that every Python carries (the standard library's sources) → tokenizer → corpora → a
small teacher → its logit store → the same student twice, LM only and PD* → all three on files that
none was trained on. Every stage is a command that a user would type; its output is under
build/demo/seed-N/logs. An interrupted demo goes on at the stage where it was stopped.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_pd.store import LogitStore

ROOT = Path("build/demo")
VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 128
GLOBAL_BATCH = 32
PROCESSES = 2
HELD_OUT_BYTES = 300_000
# The bytes that a token of this tokenizer takes, with a margin: sizes the student's corpus.
BYTES_PER_TOKEN = 2.1


@dataclass(frozen=True)
class ModelSize:
    layers: int
    hidden: int
    iterations: int
    lr: float
    decay_iterations: int

    @property
    def tokens(self) -> int:
        return self.iterations * GLOBAL_BATCH * SEQUENCE_LENGTH


DISTIL = "train the student, PD*"

# The long decay is worth a tenth of a nat to the teacher, and the student has to have something to
# learn from it; both students have one schedule.
TEACHER = ModelSize(layers=4, hidden=256, iterations=350, lr=2e-3, decay_iterations=140)
STUDENT = ModelSize(layers=2, hidden=128, iterations=200, lr=3e-3, decay_iterations=40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    demo = Demo(seed)
    try:
        demo.run()
    except KeyboardInterrupt:
        print(f"\nstopped; `make demo SEED={seed}` goes on at the unfinished stage")
        return 130
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(demo)
    demo.finished()
    return 0


class StageError(Exception):
    """A stage's command failed."""


class Demo:
    """The stages, in order, and what each of them has left behind."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.folder = ROOT / f"seed-{seed}"
        self.logs = self.folder / "logs"
        self._progress_file = self.folder / "finished-stages.json"
        settings = {"teacher": asdict(TEACHER), "student": asdict(STUDENT)}
        state = self._read_progress()
        if state.get("settings") != settings:
            shutil.rmtree(self.folder, ignore_errors=True)
            state = {}
        self.seconds: dict[str, float] = state.get("seconds", {})
        self._settings = settings
        self.logs.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def log_of(self, stage: str) -> Path:
        return self.logs / (re.sub(r"\W+", "-", stage.lower()).strip("-") + ".log")

    def run(self) -> None:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(width=100)) as progress:
            for name, command in self._stages():
                task = progress.add_task(name, total=1.0)
                if name not in self.seconds:
                    start = time.monotonic()
                    self._run_stage(
                        name, command, lambda done, task=task: progress.update(task, completed=done)
                    )
                    self.seconds[name] = round(time.monotonic() - start, 1)
                    self._write_progress()
                progress.update(task, completed=1.0)

    def finished(self) -> None:
        """The next `make demo` with this seed starts anew."""
        self._progress_file.unlink()

    def _stages(self):
        yield "collect text", lambda: write_text(self.folder, self.seed)
        yield (
            "train the tokenizer",
            [
                *_command("train-tokenizer"),
                *("--input", self.path("teacher.jsonl"), "--output", self.path("tokenizer.model")),
                *("--vocab-size", str(VOCAB_SIZE), "--max-bytes", "8000000"),
            ],
        )
        for corpus in ("teacher", "student", "heldout"):
            yield (
                f"tokenize the {corpus} corpus",
                [
                    *_command("preprocess"),
                    *("--input", self.path(f"{corpus}.jsonl")),
                    *("--output-prefix", self.path(corpus)),
                    *("--tokenizer-model", self.path("tokenizer.model")),
                ],
            )
        yield "train the teacher", self._train("teacher", "teacher", TEACHER)
        yield (
            "dump the teacher's logits",
            [
                *_torchrun("megatron_pd.cli", "dump"),
                *("--load", self.path("checkpoints/teacher")),
                *("--data-path", self.path("student"), "--micro-batch-size", "32"),
                *("--dump-top-p", "0.95", "--dump-top-k", "50", "--dump-overlap", "0"),
            ],
        )
        yield "train the student, LM only", self._train("student_lm_only", "student", STUDENT)
        yield (
            DISTIL,
            [
                *self._train("student_pd", "student", STUDENT),
                *("--pd-recipe", "pd-star", "--timing-log-level", "2"),
            ],
        )
        for model in ("teacher", "student_lm_only", "student_pd"):
            yield (
                f"evaluate {model}",
                [
                    *_torchrun("megatron_pd.cli", "evaluate"),
                    *("--load", self.path(f"checkpoints/{model}")),
                    *("--data-path", self.path("heldout"), "--micro-batch-size", "32"),
                    *("--evaluate-output", self.path(f"{model}.json")),
                ],
            )

    def _train(self, model: str, corpus: str, size: ModelSize) -> list[str]:
        return [
            *_torchrun("megatron_pd.pretrain"),
            *f"--num-layers {size.layers} --hidden-size {size.hidden}".split(),
            *f"--num-attention-heads 4 --seq-length {SEQUENCE_LENGTH}".split(),
            *f"--max-position-embeddings {SEQUENCE_LENGTH}".split(),
            *"--position-embedding-type rope --normalization RMSNorm".split(),
            *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
            *f"--micro-batch-size {GLOBAL_BATCH // PROCESSES}".split(),
            *f"--global-batch-size {GLOBAL_BATCH} --train-iters {size.iterations}".split(),
            *f"--lr {size.lr} --lr-decay-style WSD --lr-wsd-decay-style linear".split(),
            *f"--lr-warmup-iters {size.iterations // 20}".split(),
            *f"--lr-wsd-decay-iters {size.decay_iterations}".split(),
            *"--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0".split(),
            *"--use-distributed-optimizer --no-create-attention-mask-in-dataloader".split(),
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", self.path("tokenizer.model")),
            *("--data-path", self.path(corpus), "--split", "100,0,0"),
            *("--data-cache-path", self.path("index-cache"), "--num-workers", "0"),
            *f"--eval-iters 0 --log-interval 10 --seed {self.seed}".split(),
            *("--tensorboard-dir", self.path(f"tensorboard/{model}")),
            *("--tensorboard-log-interval", "1"),
            *("--save", self.path(f"checkpoints/{model}")),
            *("--save-interval", str(size.iterations)),
        ]

    def _run_stage(self, name, command, show) -> None:
        if callable(command):
            command()
            return
        log = self.log_of(name)
        with open(log, "w") as output:
            output.write(" ".join(command) + "\n")
            output.flush()
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                time.sleep(0.25)
                show(_share_done(log))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if process.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise StageError(f"{name} failed; the end of {log}:\n{tail}")

    def _read_progress(self) -> dict:
        try:
            return json.loads(self._progress_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _write_progress(self) -> None:
        self._progress_file.write_text(
            json.dumps({"settings": self._settings, "seconds": self.seconds})
        )


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "megatron_pd.cli", name]


def _torchrun(module: str, *arguments: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={PROCESSES}", "-m", module, *arguments]


def _share_done(log: Path) -> float:
    """How far a stage is, from the last progress that Megatron or tqdm wrote."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        tail = file.read().decode(errors="replace")
    if iterations := re.findall(r"iteration +(\d+)/ *(\d+)", tail):
        done, total = map(int, iterations[-1])
        return done / total
    if percents := re.findall(r"(\d+)%\|", tail):
        return int(percents[-1]) / 100
    return 0.0


def write_text(folder: Path, seed: int) -> None:
    """The standard library as JSON lines: held-out files, the teacher's, of those the student's.

    Tests and encodings are left out: they are tables more than text.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    files = sorted(f for f in stdlib.rglob("*.py") if not left_out & set(f.parts))
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
    order = np.random.default_rng(seed).permutation(len(texts))
    student_bytes = STUDENT.tokens * BYTES_PER_TOKEN
    heldout, rest = _take([texts[i] for i in order if texts[i].strip()], HELD_OUT_BYTES)
    student, _ = _take(rest, student_bytes)
    for name, documents in {"heldout": heldout, "teacher": rest, "student": student}.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _take(texts: list[str], num_bytes: float) -> tuple[list[str], list[str]]:
    """The first texts that make up `num_bytes`, and the others."""
    sizes = np.cumsum([len(text.encode()) for text in texts])
    count = int(np.searchsorted(sizes, num_bytes)) + 1
    return texts[:count], texts[count:]


def report(demo: Demo) -> None:
    """Write report.json, report.md and the loss curves; print the table."""
    figures = _figures(demo)
    for folder in (demo.folder, ROOT):
        (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
        (folder / "report.md").write_text(_markdown(figures))
        _plot_curves(demo, folder / "loss-curves.png")
    table = Table(title=f"Held-out files of the standard library, seed {demo.seed}")
    for column in ("model", "LM loss (nats/token)", "calibration error (ECE)", "trained on"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in _rows(figures):
        table.add_row(*row)
    console = Console(width=100)
    console.print(table)
    console.print(
        f"PD* against LM only: {figures['gain_nats']:.3f} nats lower loss, from a store of "
        f"{figures['store_bytes_per_token']:.0f} bytes per token "
        f"({figures['mean_entries_per_token']:.1f} entries). {figures['seconds']['total']:.0f} s. "
        f"More in {ROOT}/report.md and {ROOT}/loss-curves.png."
    )


def _figures(demo: Demo) -> dict:
    results = {
        model: json.loads(Path(demo.path(f"{model}.json")).read_text())
        for model in ("teacher", "student_lm_only", "student_pd")
    }
    store = LogitStore(demo.path("student.pd"))
    figures: dict = {"seed": demo.seed}
    for model, result in results.items():
        figures[f"{model}_lm_loss"] = result["lm_loss"]
        figures[f"{model}_ece"] = result["ece"]
    figures["gain_nats"] = figures["student_lm_only_lm_loss"] - figures["student_pd_lm_loss"]
    figures["tokens"] = {
        "teacher": TEACHER.tokens,
        "student": STUDENT.tokens,
        "held_out": results["teacher"]["tokens"],
        "store": store.num_rows,
    }
    figures["store_bytes"] = store.nbytes
    figures["store_bytes_per_token"] = store.nbytes / store.num_rows
    figures["mean_entries_per_token"] = store.num_entries / store.num_rows
    figures["milliseconds_per_step"], figures["of_them_waiting_for_rows"] = _step_and_wait(
        demo.log_of(DISTIL).read_text()
    )
    figures["seconds"] = {**demo.seconds, "total": round(sum(demo.seconds.values()), 1)}
    figures["versions"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "numpy", "sentencepiece")},
    }
    return figures


def _step_and_wait(log: str) -> tuple[float, float]:
    """Milliseconds of a step, and of the slower rank's wait for the teacher's rows in it.

    From what Megatron printed; the first interval, in which everything starts, is left out.
    """
    steps = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log)
    waits = re.findall(r"teacher-rows \.+: \([\d.]+, ([\d.]+)\)", log)
    return np.mean(np.float64(steps[1:])).item(), np.mean(np.float64(waits[1:])).item()


def _rows(figures: dict) -> list[tuple[str, str, str, str]]:
    names = {
        "teacher": ("teacher", "teacher"),
        "student_lm_only": ("student, LM only", "student"),
        "student_pd": ("student, PD*", "student"),
    }
    return [
        (
            name,
            f"{figures[f'{model}_lm_loss']:.4f}",
            f"{figures[f'{model}_ece']:.4f}",
            f"{figures['tokens'][corpus]:,} tokens",
        )
        for model, (name, corpus) in names.items()
    ]


def _markdown(figures: dict) -> str:
    lines = [
        f"# Demo, seed {figures['seed']}",
        "",
        "| model | LM loss (nats/token) | ECE | trained on |",
        "| --- | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in _rows(figures)),
        "",
        f"PD* lowers the student's held-out loss by {figures['gain_nats']:.4f} nats.",
        "",
        f"Logit store: {figures['store_bytes']:,} bytes, "
        f"{figures['store_bytes_per_token']:.1f} per token, "
        f"{figures['mean_entries_per_token']:.1f} entries per token.",
        "",
        f"A step of PD* took {figures['milliseconds_per_step']:.0f} ms and waited "
        f"{figures['of_them_waiting_for_rows']:.2f} ms of them for the teacher's rows (Megatron's "
        "timer `teacher-rows`).",
        "",
        "| stage | seconds |",
        "| --- | ---: |",
        *(f"| {stage} | {seconds} |" for stage, seconds in figures["seconds"].items()),
        "",
        "![loss curves](loss-curves.png)",
        "",
    ]
    return "\n".join(lines)


def _plot_curves(demo: Demo, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for model, label in {
        "teacher": "teacher",
        "student_lm_only": "student, LM only",
        "student_pd": "student, PD*",
    }.items():
        scalars = _scalars(demo.path(f"tensorboard/{model}"))
        steps, losses = scalars["lm loss"]
        left.plot(steps, _smooth(losses), label=label)
    left.set(xlabel="iteration", ylabel="training LM loss (nats)", ylim=(2.3, 6.0))
    left.legend()
    right.plot(*scalars["kd loss"], color="tab:red", label="KD loss (nats)")
    right.set(xlabel="iteration of the PD* student", ylabel="KD loss (nats)")
    schedule = right.twinx()
    schedule.plot(*scalars["alpha"], color="tab:gray", label="α")
    schedule.set(ylabel="α", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray, window: int = 10) -> np.ndarray:
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.concatenate([np.full(len(values) - len(means), np.nan), means])


def _scalars(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """TensorBoard's scalars of a run: name → (steps, values)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: (
            np.array([event.step for event in events.Scalars(name)]),
            np.array([event.value for event in events.Scalars(name)]),
        )
        for name in events.Tags()["scalars"]
    }


if __name__ == "__main__":
    sys.exit(main())

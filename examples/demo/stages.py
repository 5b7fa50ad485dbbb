"""What the demo runs: its sizes, its stages and their commands."""

import json
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DISTILLATION", "DUMP", "MODELS", "Demo", "ModelSize", "Stage"]

# The bytes that a token of a tokenizer of 2,048 pieces takes, with a margin.
BYTES_PER_TOKEN = 2.1

DUMP = "dump the teacher's logits"
DISTILLATION = "train the student, PD*"
MODELS = {  # name of its files → what the report calls it, corpus that it is trained on
    "teacher": ("teacher", "teacher"),
    "student_lm_only": ("student, LM only", "student"),
    "student_pd": ("student, PD*", "student"),
}


@dataclass(frozen=True)
class Stage:
    """One step: a command line, or a function of this process."""

    name: str
    command: Sequence[str] | Callable[[], None]

    replaces: Path | None = None
    """Folder that a stopped attempt would leave its traces in: removed before another one."""


@dataclass(frozen=True)
class ModelSize:
    """A model and how long it is trained: warmup over a twentieth of its iterations, then a stable
    learning rate `lr`, then a linear decay."""

    layers: int
    hidden: int
    iterations: int
    lr: float
    decay_iterations: int


@dataclass(frozen=True)
class Demo:
    """All that the demo's commands are made of."""

    seed: int = 1
    root: Path = Path("build/demo")

    # The long decay is worth a tenth of a nat to the teacher, and the student has to have something
    # to learn from it; both students have one schedule.
    teacher: ModelSize = ModelSize(
        layers=4, hidden=256, iterations=350, lr=2e-3, decay_iterations=140
    )
    student: ModelSize = ModelSize(
        layers=2, hidden=128, iterations=200, lr=3e-3, decay_iterations=40
    )
    vocab_size: int = 2048
    sequence_length: int = 128
    global_batch: int = 32
    processes: int = 2
    text_bytes: int | None = None
    """Of the standard library, held-out files included; None is all of it."""

    held_out_bytes: int = 300_000

    @property
    def folder(self) -> Path:
        return self.root / f"seed-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the stages' results depend on, but for the seed, which names the folder."""
        settings = asdict(self)
        return {name: settings[name] for name in settings if name not in ("seed", "root")}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def tokens(self, size: ModelSize) -> int:
        """Tokens that such a model is trained on."""
        return size.iterations * self.global_batch * self.sequence_length

    def stages(self) -> list[Stage]:
        """The whole demo, in order."""
        return [
            *self.teacher_stages(),
            self.training_stage(
                "train the student, LM only", "student_lm_only", "student", self.student
            ),
            self.training_stage(
                DISTILLATION,
                "student_pd",
                "student",
                self.student,
                *("--pd-recipe", "pd-star", "--timing-log-level", "2"),
            ),
            *(Stage(f"evaluate {model}", self.evaluation(model)) for model in MODELS),
        ]

    def teacher_stages(self) -> list[Stage]:
        """Up to the store of the teacher's logits."""
        return [
            Stage("collect text", self.write_text),
            Stage(
                "train the tokenizer",
                [
                    *_command("train-tokenizer"),
                    *("--input", self.path("teacher.jsonl")),
                    *("--output", self.path("tokenizer.model")),
                    *("--vocab-size", str(self.vocab_size), "--max-bytes", "8000000"),
                ],
            ),
            *(
                Stage(f"tokenize the {corpus} corpus", self.tokenization(corpus))
                for corpus in ("teacher", "student", "heldout")
            ),
            self.training_stage("train the teacher", "teacher", "teacher", self.teacher),
            Stage(DUMP, self.dump("--dump-top-p", "0.95", "--dump-top-k", "50")),
        ]

    def tokenization(self, corpus: str) -> list[str]:
        return [
            *_command("preprocess"),
            *("--input", self.path(f"{corpus}.jsonl")),
            *("--output-prefix", self.path(corpus)),
            *("--tokenizer-model", self.path("tokenizer.model")),
        ]

    def dump(self, *rows: str) -> list[str]:
        """The command that stores the teacher's logits of the student's corpus; `rows` are the
        flags that say what is kept of them."""
        return [
            *torchrun(self.processes, "megatron_pd.cli", "dump"),
            *("--load", self.path("checkpoints/teacher")),
            *("--data-path", self.path("student"), "--micro-batch-size", str(self.global_batch)),
            *(*rows, "--dump-overlap", "0"),
        ]

    def training_stage(
        self,
        name: str,
        model: str,
        corpus: str,
        size: ModelSize,
        *flags: str,
        processes: int | None = None,
    ) -> Stage:
        """A training, whose TensorBoard curves are of one attempt."""
        return Stage(
            name,
            self.training(model, corpus, size, *flags, processes=processes),
            replaces=self.folder / "tensorboard" / model,
        )

    def training(
        self,
        model: str,
        corpus: str,
        size: ModelSize,
        *flags: str,
        processes: int | None = None,
    ) -> list[str]:
        """The command that trains a model; of a flag that comes twice the last counts."""
        processes = processes or self.processes
        return [
            *torchrun(processes, "megatron_pd.pretrain"),
            *f"--num-layers {size.layers} --hidden-size {size.hidden}".split(),
            *f"--num-attention-heads 4 --seq-length {self.sequence_length}".split(),
            *f"--max-position-embeddings {self.sequence_length}".split(),
            *"--position-embedding-type rope --normalization RMSNorm".split(),
            *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
            *f"--micro-batch-size {self.global_batch // processes}".split(),
            *f"--global-batch-size {self.global_batch} --train-iters {size.iterations}".split(),
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
            *flags,
        ]

    def evaluation(self, model: str, processes: int | None = None) -> list[str]:
        """The command that writes a model's figures on the held-out files to `model`.json."""
        return [
            *torchrun(processes or self.processes, "megatron_pd.cli", "evaluate"),
            *("--load", self.path(f"checkpoints/{model}")),
            *("--data-path", self.path("heldout"), "--micro-batch-size", str(self.global_batch)),
            *("--evaluate-output", self.path(f"{model}.json")),
        ]

    def write_text(self) -> None:
        """The standard library as JSON lines: held-out files, the teacher's, and of those the
        student's. Tests and encodings are left out: they are tables more than text.
        """
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
        files = sorted(f for f in stdlib.rglob("*.py") if not left_out & set(f.parts))
        texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
        order = np.random.default_rng(self.seed).permutation(len(texts))
        texts = [texts[i] for i in order if texts[i].strip()]
        if self.text_bytes is not None:
            texts, _ = _take(texts, self.text_bytes)
        heldout, rest = _take(texts, self.held_out_bytes)
        student, _ = _take(rest, self.tokens(self.student) * BYTES_PER_TOKEN)
        for name, documents in {"heldout": heldout, "teacher": rest, "student": student}.items():
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            Path(self.path(f"{name}.jsonl")).write_text("".join(lines))


def _take(texts: list[str], num_bytes: float) -> tuple[list[str], list[str]]:
    """The first texts that make up `num_bytes`, and the others."""
    ends = np.cumsum([len(text.encode()) for text in texts])
    count = int(np.searchsorted(ends, num_bytes)) + 1
    return texts[:count], texts[count:]


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "megatron_pd.cli", name]


def torchrun(processes: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module as so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", module, *arguments]

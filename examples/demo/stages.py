"""What the demo runs: its sizes, its stages and their commands."""

import json
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BYTES_PER_TOKEN", "DISTILLATION", "DUMP", "Demo", "ModelSize", "Stage", "script"]

BYTES_PER_TOKEN = 4.1
"""What a token of SmolLM2's tokenizer takes of the standard library's sources."""

MAX_FILE_BYTES = 8_000
"""Of each file, so that a small corpus has many."""

DUMP = "dump the teacher's logits"
DISTILLATION = "train the student, PD*"


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

    # Batch, learning rate and decay that were tried first for LM only (docs/demo.md).
    student: ModelSize = ModelSize(
        layers=2, hidden=128, iterations=400, lr=1e-3, decay_iterations=160
    )
    sequence_length: int = 256
    global_batch: int = 4
    processes: int = 2
    student_tokens: int = 150_000
    held_out_bytes: int = 100_000
    bf16: bool = True
    """Megatron's mixed precision, for the teacher and the students; else float32."""

    @property
    def models(self) -> dict[str, str]:
        """Name of a model's files → what the report calls it."""
        return {
            "teacher": "SmolLM2-135M, the teacher",
            "student_lm_only": "student, LM only",
            "student_pd": "student, PD*",
        }

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
        students = [model for model in self.models if model != "teacher"]
        return [
            *self.teacher_stages(),
            self.training_stage("train the student, LM only", "student_lm_only", self.student),
            self.training_stage(
                DISTILLATION,
                "student_pd",
                self.student,
                *("--pd-recipe", "pd-star", "--timing-log-level", "2"),
            ),
            *(Stage(f"evaluate {model}", self.evaluation(model)) for model in self.models),
            *(Stage(f"export {model}", self.export(model)) for model in students),
            Stage(
                "write a line of Python",
                script(
                    "generate.py",
                    self.path("lines.json"),
                    *(self.hugging_face(model) for model in self.models),
                ),
            ),
        ]

    def teacher_stages(self) -> list[Stage]:
        """Up to the store of the teacher's logits."""
        return [
            Stage("unpack SmolLM2", script("smollm2.py", self.hugging_face("teacher"))),
            Stage(
                "import SmolLM2 into Megatron",
                self.imported(self.hugging_face("teacher"), "teacher"),
            ),
            Stage("collect text", self.write_text),
            *(
                Stage(f"tokenize the {corpus} corpus", self.tokenization(corpus))
                for corpus in ("student", "heldout")
            ),
            Stage(DUMP, self.dump("--dump-top-p", "0.95", "--dump-top-k", "50")),
        ]

    def hugging_face(self, model: str) -> str:
        """The Hugging Face folder of a model; the teacher's is the same for all seeds."""
        return str(self.root / "smollm2") if model == "teacher" else self.path(model)

    def imported(self, folder: str, model: str) -> list[str]:
        """The command that makes a Hugging Face folder a model's checkpoint."""
        return [*_command("import-hf"), folder, "--save", self.path(f"checkpoints/{model}")]

    def export(self, model: str) -> list[str]:
        return [
            *_command("export-hf"),
            *("--load", self.path(f"checkpoints/{model}")),
            *("--output", self.hugging_face(model)),
        ]

    @property
    def tokenizer(self) -> list[str]:
        folder = self.hugging_face("teacher")
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]

    @property
    def precision(self) -> list[str]:
        return ["--bf16"] if self.bf16 else []

    def tokenization(self, corpus: str) -> list[str]:
        return [
            *_command("preprocess"),
            *("--input", self.path(f"{corpus}.jsonl")),
            *("--output-prefix", self.path(corpus)),
            *self.tokenizer,
        ]

    def dump(self, *rows: str) -> list[str]:
        """The command that stores the teacher's logits of the student's corpus; `rows` are the
        flags that say what is kept of them."""
        return [
            *torchrun(self.processes, "megatron_pd.cli", "dump"),
            *("--load", self.path("checkpoints/teacher"), *self.precision),
            *("--data-path", self.path("student"), "--micro-batch-size", "16"),
            *("--seq-length", str(self.sequence_length)),
            *(*rows, "--dump-overlap", "0"),
        ]

    def training_stage(
        self, name: str, model: str, size: ModelSize, *flags: str, processes: int | None = None
    ) -> Stage:
        """A training, whose TensorBoard curves are of one attempt."""
        return Stage(
            name,
            self.training(model, size, *flags, processes=processes),
            replaces=self.folder / "tensorboard" / model,
        )

    def architecture(self, size: ModelSize) -> list[str]:
        return [
            *f"--num-layers {size.layers} --hidden-size {size.hidden}".split(),
            *"--num-attention-heads 4 --position-embedding-type rope".split(),
            *f"--max-position-embeddings {self.sequence_length} --normalization RMSNorm".split(),
            *"--swiglu --disable-bias-linear".split(),
        ]

    def training(
        self, model: str, size: ModelSize, *flags: str, processes: int | None = None
    ) -> list[str]:
        """The command that trains a model on the student's corpus; of a flag that comes twice the
        last counts."""
        processes = processes or self.processes
        return [
            *torchrun(processes, "megatron_pd.pretrain"),
            *self.architecture(size),
            *("--seq-length", str(self.sequence_length)),
            *"--attention-dropout 0 --hidden-dropout 0".split(),
            *self.precision,
            *f"--micro-batch-size {self.global_batch // processes}".split(),
            *f"--global-batch-size {self.global_batch} --train-iters {size.iterations}".split(),
            *f"--lr {size.lr} --lr-decay-style WSD --lr-wsd-decay-style linear".split(),
            *f"--lr-warmup-iters {size.iterations // 20}".split(),
            *f"--lr-wsd-decay-iters {size.decay_iterations}".split(),
            *"--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0".split(),
            *"--use-distributed-optimizer --no-create-attention-mask-in-dataloader".split(),
            *self.tokenizer,
            *("--data-path", self.path("student"), "--split", "100,0,0"),
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
            *("--load", self.path(f"checkpoints/{model}"), *self.precision),
            *("--data-path", self.path("heldout"), "--micro-batch-size", str(self.global_batch)),
            *("--seq-length", str(self.sequence_length)),
            *("--evaluate-output", self.path(f"{model}.json")),
        ]

    def write_text(self) -> None:
        """Files of the standard library as JSON lines: the student's, and others, held out."""
        texts = library_texts(self.seed, MAX_FILE_BYTES)
        heldout, rest = take(texts, self.held_out_bytes)
        student, _ = take(rest, self.student_tokens * BYTES_PER_TOKEN)
        self.write_documents({"heldout": heldout, "student": student})

    def write_documents(self, corpora: dict[str, list[str]]) -> None:
        for name, documents in corpora.items():
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            Path(self.path(f"{name}.jsonl")).write_text("".join(lines))


def library_texts(seed: int, max_bytes: int | None = None) -> list[str]:
    """The standard library's sources, shuffled, each up to `max_bytes`. Tests and encodings are
    left out: they are tables more than text."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    files = sorted(f for f in stdlib.rglob("*.py") if not left_out & set(f.parts))
    texts = [f.read_bytes()[:max_bytes].decode(errors="ignore") for f in files]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order if texts[i].strip()]


def take(texts: list[str], num_bytes: float) -> tuple[list[str], list[str]]:
    """The first texts that make up `num_bytes`, and the others."""
    ends = np.cumsum([len(text.encode()) for text in texts])
    count = int(np.searchsorted(ends, num_bytes)) + 1
    return texts[:count], texts[count:]


def script(name: str, *arguments: str) -> list[str]:
    """The command that runs a script of this folder."""
    return [sys.executable, str(Path(__file__).with_name(name)), *arguments]


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "megatron_pd.cli", name]


def torchrun(processes: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module as so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", module, *arguments]

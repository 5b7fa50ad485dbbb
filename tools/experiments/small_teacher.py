"""What the experiments share: a teacher that is itself trained in minutes, its stores, and students
of one process."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # where `demo` is

from demo.report import Curves, read_scalars
from demo.runner import Runner, run_to_exit_status
from demo.stages import DUMP, Demo, ModelSize, Stage, library_texts, take

__all__ = [
    "DRAWS",
    "ROOT",
    "Curves",
    "ModelSize",
    "Runner",
    "SmallTeacher",
    "Stage",
    "read_scalars",
    "run_experiment",
    "sampled_store",
    "teacher_stages",
]

ROOT = Path("build/tails")
DRAWS = 50

# The long decay is worth a tenth of a nat to the teacher, and the student has to have something to
# learn from it.
TEACHER = ModelSize(layers=4, hidden=256, iterations=350, lr=2e-3, decay_iterations=140)
STUDENT = ModelSize(layers=2, hidden=128, iterations=200, lr=3e-3, decay_iterations=40)

# The bytes that a token of a tokenizer of 2,048 pieces takes, with a margin.
BYTES_PER_TOKEN = 2.1


@dataclass(frozen=True)
class SmallTeacher(Demo):
    """Tokenizer, teacher and student from the same text, the student's a part of the teacher's."""

    teacher: ModelSize = TEACHER
    student: ModelSize = STUDENT
    vocab_size: int = 2048
    sequence_length: int = 128
    global_batch: int = 32
    held_out_bytes: int = 300_000
    bf16: bool = False
    text_bytes: int | None = None
    """Of the standard library, held-out files included; None is all of it."""

    @property
    def tokenizer(self) -> list[str]:
        model = self.path("tokenizer.model")
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]

    def teacher_stages(self) -> list[Stage]:
        """Up to the store of the teacher's top-0.95-50 rows."""
        return [
            Stage("collect text", self.write_text),
            Stage(
                "train the tokenizer",
                [
                    *(sys.executable, "-m", "megatron_pd.cli", "train-tokenizer"),
                    *("--input", self.path("teacher.jsonl")),
                    *("--output", self.path("tokenizer.model")),
                    *("--vocab-size", str(self.vocab_size), "--max-bytes", "8000000"),
                ],
            ),
            *(
                Stage(f"tokenize the {corpus} corpus", self.tokenization(corpus))
                for corpus in ("teacher", "student", "heldout")
            ),
            self.training_stage(
                "train the teacher", "teacher", self.teacher, "--data-path", self.path("teacher")
            ),
            Stage(DUMP, self.dump("--dump-top-p", "0.95", "--dump-top-k", "50")),
        ]

    def architecture(self, size: ModelSize) -> list[str]:
        return [flag for flag in super().architecture(size) if flag != "--swiglu"]

    def write_text(self) -> None:
        """The standard library: held-out files, the teacher's, and of those the student's."""
        texts = library_texts(self.seed)
        if self.text_bytes is not None:
            texts, _ = take(texts, self.text_bytes)
        heldout, rest = take(texts, self.held_out_bytes)
        student, _ = take(rest, self.tokens(self.student) * BYTES_PER_TOKEN)
        self.write_documents({"heldout": heldout, "teacher": rest, "student": student})


def run_experiment(demo: Demo, run: Callable[[Runner], None]) -> int:
    """Call `run` with what runs stages in the demo's folder; returns the exit status."""
    runner = Runner(demo.folder, demo.settings)
    again = f"`{shlex.join(['python', *sys.argv])}` goes on at what is unfinished"
    return run_to_exit_status(lambda: run(runner), runner, again)


def teacher_stages(demo: SmallTeacher) -> list[Stage]:
    """The teacher, the store of its top-0.95-50 rows, and one of random draws."""
    draws = demo.dump("--dump-sampled", str(DRAWS), "--dump-store", sampled_store(demo))
    return [*demo.teacher_stages(), Stage("dump random draws", draws)]


def sampled_store(demo: Demo) -> str:
    """Path of the store of random draws."""
    return demo.path("sampled.pd")

"""Training and dump jobs of a tiny model: their flags, how they run, what they logged."""

import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
DOCUMENTS = 300
VOCAB_SIZE = 370  # 384 with Megatron's padding

ARCHITECTURE = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
    --tokenizer-type SentencePieceTokenizer
""".split()

TRAINING = """
    --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --seed 1234 --lr 5e-3
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 2 --lr-warmup-iters 2
    --clip-grad 1.0 --weight-decay 0.1 --split 100,0,0 --eval-iters 0
    --num-workers 0
    --no-create-attention-mask-in-dataloader --log-interval 1 --dataloader-type single
""".split()

PD_STAR = "--pd-recipe pd-star".split()

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2pp2": (
        4,
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    ),
    "pp2 interleaved": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
    ),
    "dp2": (2, ["--use-distributed-optimizer"]),
}


@dataclass(frozen=True)
class Outcome:
    statuses: list[int]
    log: str


class JobRunner:
    """Runs jobs on the fork server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(
        self,
        module: str,
        argv: Sequence[Any],
        ranks: int = 1,
        *,
        kill_when: Path | str | None = None,
    ) -> Outcome:
        log = self.folder / f"log-{uuid.uuid4().hex}"
        job = {
            "module": module,
            "argv": list(map(str, argv)),
            "ranks": ranks,
            "log": str(log),
            "kill_when": None if kill_when is None else str(kill_when),
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        statuses = json.loads(self._server.stdout.readline())["statuses"]
        logs = [Path(f"{log}.{rank}") for rank in range(ranks)]
        return Outcome(statuses, "\n".join(path.read_text() for path in logs if path.exists()))

    def check(self, module: str, argv: Sequence[Any], ranks: int = 1) -> str:
        """Run a job that must succeed; returns its log."""
        outcome = self.run(module, argv, ranks)
        assert not any(outcome.statuses), f"{outcome.statuses}: {outcome.log[-4000:]}"
        return outcome.log


def make_corpus(
    runner: JobRunner, text: Path, tokenizer: Path, vocab_size: int, corpus: Path
) -> None:
    """Train the tokenizer `tokenizer` on a text, and turn the text into the corpus `corpus`."""
    train = ["train-tokenizer", "--input", text, "--output", tokenizer, "--vocab-size", vocab_size]
    runner.check("megatron_pd.cli", train)
    preprocess = ["preprocess", "--input", text, "--output-prefix", corpus]
    runner.check("megatron_pd.cli", [*preprocess, "--tokenizer-model", tokenizer])


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "MEGATRON_PD_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


@dataclass(frozen=True)
class World:
    """The files that all jobs share."""

    runner: JobRunner
    folder: Path
    tokenizer: Path
    corpus: Path
    student: Path | None = None
    """Checkpoint of random weights, the same whatever the parallel layout."""

    @property
    def architecture(self) -> list[str]:
        return [*ARCHITECTURE, "--tokenizer-model", str(self.tokenizer)]

    def training_flags(self, *flags: Any, corpus: Path | None = None) -> list[str]:
        return [
            *self.architecture,
            *TRAINING,
            *("--data-path", str(corpus or self.corpus)),
            *map(str, flags),
        ]

    def from_student(self) -> list[str]:
        return ["--load", str(self.student), "--finetune", "--no-load-optim", "--no-load-rng"]

    def dump_flags(self, teacher: Path, *flags: Any, corpus: Path | None = None) -> list[str]:
        tokenizer = ["--tokenizer-model", self.tokenizer, "--load", teacher]
        return list(map(str, [*tokenizer, "--data-path", corpus or self.corpus, *flags]))

    def dump(self, teacher: Path, *flags: Any, ranks: int = 1) -> None:
        self.runner.check("megatron_pd.teacher.megatron", self.dump_flags(teacher, *flags), ranks)

    def train(self, *flags: Any, ranks: int = 1) -> dict[str, np.ndarray]:
        """Train; returns the curves that TensorBoard got: tag → float32 values, by iteration."""
        return self.curves_of(self.training_flags(*flags), ranks)

    def curves_of(
        self, argv: Sequence[str], ranks: int = 1, module: str = "megatron_pd.pretrain"
    ) -> dict[str, np.ndarray]:
        """As `train`, with a command line that is whole."""
        events = self.folder / f"events-{uuid.uuid4().hex}"
        self.runner.check(module, [*argv, "--tensorboard-dir", events], ranks)
        return curves(events)


def curves(events: Path) -> dict[str, np.ndarray]:
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: np.array([event.value for event in accumulator.Scalars(tag)])
        for tag in accumulator.Tags()["scalars"]
    }


def write_corpus(prefix: Path, documents: list[np.ndarray]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def write_text(path: Path, seed: int) -> None:
    """Sentences of a language with 60 words, in which a word says much about the next one."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]
    followers = {word: rng.sample(words, 4) for word in words}
    with path.open("w") as lines:
        for _ in range(DOCUMENTS):
            word, text = rng.choice(words), []
            for _ in range(rng.randint(1, 60)):
                text.append(word)
                word = rng.choice(followers[word])
            lines.write('{"text": "' + " ".join(text) + '."}\n')

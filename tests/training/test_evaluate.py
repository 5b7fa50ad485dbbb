"""`megatron-pd evaluate` against a plain, dense, float64 pass over the same checkpoint.

The reference asks for every token by itself which context it is predicted from, has Megatron's own
logits of that context, and computes the figures from their definitions.
"""

import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jobs import LAYOUTS, VOCAB_SIZE, World, write_corpus
from megatron.core.datasets.indexed_dataset import IndexedDataset

SEQUENCE_LENGTH = 64
BINS = 15
OVERLAPS = (0, 16)

# Tokens of the documents: nothing to predict, a window that is full to the last token, one token
# more than that, two and three windows, and some of any length. The second corpus leaves all but
# one of the replicas without a document.
LENGTHS = [1, 2, 3, 63, 64, 65, 66, 1, 128, 129, 130, 113, 177, 178, 200, 1]
SECOND_LENGTHS = [150]


@dataclass
class HeldOut:
    seed: int
    prefixes: list[Path]
    documents: list[np.ndarray]
    logits: dict[tuple[int, int, int], np.ndarray]
    """float64 [length, vocabulary] of the window (document, start, length)."""


def context_start(position: int, overlap: int) -> int:
    """The first token of the window that predicts the token after `position`.

    The first window's own inputs are those before SEQUENCE_LENGTH; each later window begins
    `overlap` tokens before the end of the one before it.
    """
    step = SEQUENCE_LENGTH - overlap
    return 0 if position < SEQUENCE_LENGTH else step * -(-(position - SEQUENCE_LENGTH + 1) // step)


def window_at(length: int, start: int) -> int:
    """Inputs of the window at `start` of a document of `length` tokens: its last predicts none."""
    return min(SEQUENCE_LENGTH, length - 1 - start)


@pytest.fixture(scope="module")
def held_out(bare_world: World, teacher: Path) -> HeldOut:
    """Pieces of the text that the model was trained on, from anywhere in it, as documents."""
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    corpus = IndexedDataset(str(bare_world.corpus))
    text = np.concatenate([corpus[document] for document in range(len(corpus))])
    lengths = [*LENGTHS, *rng.integers(1, 100, 12)]
    rng.shuffle(lengths)
    parts = []
    for prefix, part in (("held-out", lengths), ("held-out-2", SECOND_LENGTHS)):
        starts = rng.integers(0, len(text) - 200, len(part))
        parts.append([text[start : start + n] for start, n in zip(starts, part, strict=True)])
        write_corpus(bare_world.folder / prefix, parts[-1])
    documents = parts[0] + parts[1]
    windows = sorted(
        {
            (number, start, window_at(len(tokens), start))
            for number, tokens in enumerate(documents)
            for position in range(len(tokens) - 1)
            for start in (context_start(position, overlap) for overlap in OVERLAPS)
        }
    )
    return HeldOut(
        seed,
        [bare_world.folder / "held-out", bare_world.folder / "held-out-2"],
        documents,
        dict(zip(windows, dense_logits(bare_world, teacher, documents, windows), strict=True)),
    )


def dense_logits(world: World, checkpoint: Path, documents, windows) -> list[np.ndarray]:
    lengths = [length for _, _, length in windows]
    tokens = [documents[number][start : start + length] for number, start, length in windows]
    files = world.folder / "windows.npz", world.folder / "logits.npy"
    np.savez(files[0], tokens=np.concatenate(tokens).astype(np.int64), lengths=lengths)
    (iteration,) = checkpoint.glob("iter_*")
    world.runner.check("logits_job", [iteration, *files, *world.training_flags()])
    return np.split(np.load(files[1]).astype(np.float64), np.cumsum(lengths)[:-1])


@dataclass
class Figures:
    lm_loss: float
    accuracy: float
    ece: float
    tokens: int
    unsure: int
    """Tokens whose bin of confidence or whose first place rounding may change."""


def reference(held_out: HeldOut, overlap: int) -> Figures:
    loss = right = unsure = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    tokens = 0
    for number, document in enumerate(held_out.documents):
        for position in range(len(document) - 1):
            start = context_start(position, overlap)
            window = number, start, window_at(len(document), start)
            logits = held_out.logits[window][position - start][:VOCAB_SIZE]
            logprobs = logits - logits.max()
            logprobs = logprobs - math.log(np.exp(logprobs).sum())
            following = int(document[position + 1])
            second, first = np.argsort(logprobs)[-2:]
            confidence = math.exp(logprobs[first])
            loss -= logprobs[following]
            right += first == following
            tokens += 1
            bins[min(math.floor(confidence * BINS), BINS - 1)].append(
                (confidence, bool(first == following))
            )
            to_edge = abs(confidence * BINS - round(confidence * BINS))
            unsure += to_edge < 1e-4 or logprobs[first] - logprobs[second] < 1e-4
    ece = 0.0
    for members in bins:
        if members:
            mean_confidence = sum(confidence for confidence, _ in members) / len(members)
            accuracy = sum(correct for _, correct in members) / len(members)
            ece += len(members) / tokens * abs(accuracy - mean_confidence)
    return Figures(loss / tokens, right / tokens, ece, tokens, int(unsure))


def evaluate(world: World, checkpoint: Path, prefixes: list[Path], *flags, ranks: int = 1) -> dict:
    """The figures of the file, which are also those that one rank has printed."""
    output = world.folder / "figures.json"
    output.unlink(missing_ok=True)
    argv = ["--tokenizer-model", world.tokenizer, "--load", checkpoint, "--data-path", *prefixes]
    argv += ["--evaluate-output", output, *flags]
    log = world.runner.check("megatron_pd.cli", ["evaluate", *argv], ranks)
    assert log.count(output.read_text()) == 1
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("layout", "overlap"), [("tp1", 0), ("tp1", 16), ("tp2", 16), ("pp2", 0), ("dp2", 16)]
)
def test_figures_are_those_of_a_dense_pass(
    layout: str, overlap: int, bare_world: World, teacher: Path, held_out: HeldOut
) -> None:
    ranks, flags = LAYOUTS[layout]
    overlap_flags = ["--evaluate-overlap", overlap] if overlap else []
    found = evaluate(bare_world, teacher, held_out.prefixes, *overlap_flags, *flags, ranks=ranks)
    expected = reference(held_out, overlap)
    print("seed", held_out.seed, found, expected)
    assert found.keys() == {"lm_loss", "perplexity", "accuracy", "ece", "tokens"}
    assert found["tokens"] == expected.tokens
    assert found["lm_loss"] == pytest.approx(expected.lm_loss, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected.lm_loss), rel=1e-5)
    rounding = expected.unsure / expected.tokens
    assert rounding < 0.01
    assert found["accuracy"] == pytest.approx(expected.accuracy, abs=1e-9 + rounding)
    assert found["ece"] == pytest.approx(expected.ece, abs=1e-6 + 2 * rounding)

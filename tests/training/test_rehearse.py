"""A launch line rehearsed on one CPU: a sound one at 1,024 ranks, and planted mistakes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import PD_STAR, VOCAB_SIZE, World, environment, make_corpus, write_text


def rehearse(
    world: World, *flags: Any, nodes: int, options: tuple[str, ...] = ()
) -> tuple[int, str]:
    line = f"torchrun --nnodes {nodes} --nproc-per-node 8 -m megatron_pd.pretrain".split()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_pd.cli",
            "rehearse",
            *options,
            *line,
            *world.training_flags(*flags),
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout or done.stderr


def test_a_sound_run_at_1024_ranks(world: World) -> None:
    """TP 2, PP 2 with two chunks of layers each, DP 256: its ranks 0 and 512 train."""
    plot = world.folder / "rehearsed.png"
    status, report = rehearse(
        world,
        *PD_STAR,
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
        *("--num-layers-per-virtual-pipeline-stage", 1, "--use-distributed-optimizer"),
        *("--global-batch-size", 1024, "--save", world.folder / "rehearsed", "--save-interval", 2),
        *("--data-cache-path", world.folder / "rehearsed-cache", "--bf16"),
        nodes=128,
        # A GPU that is as slow as the model is small.
        options=("--max-epochs", "1e6", "--tflops", "1e-9", "--plot", str(plot)),
    )
    assert status == 0, report
    assert "1,024 ranks: TP 2, PP 2, CP 1, DP 256" in report
    assert "layers of the stages: 2 2" in report
    assert "256 ranks read, on 64 nodes: 512 514 516 518 … 1022" in report
    assert "rank 0 of 1,024 trained" in report and "rank 512 of 1,024 trained" in report
    assert "no mistake found" in report
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not (world.folder / "rehearsed").exists()


def test_planted_mistakes_are_found_together(world: World) -> None:
    bare = world.folder / "without-store"
    for suffix in (".bin", ".idx"):
        Path(f"{bare}{suffix}").write_bytes(Path(f"{world.corpus}{suffix}").read_bytes())
    status, report = rehearse(
        world,
        *PD_STAR,
        *("--data-path", 0.5, world.corpus, 0.5, bare),
        *("--train-iters", 10**9, "--lr-wsd-decay-iters", 2 * 10**9),
        *("--save", world.folder / "full", "--save-interval", 1, "--global-batch-size", 16),
        nodes=1,
    )
    assert status == 1, report
    mistakes = [line.split(maxsplit=1)[1] for line in report.splitlines() if "MISTAKE" in line]
    assert mistakes == ["corpora and stores", "schedules", "tokens", "disk"]
    assert f"{bare}.pd does not exist: the corpus {bare} has no logit store" in report
    assert "decays over 2,000,000,000, and the run has 1,000,000,000" in report
    assert "Give a larger corpus" in report and "--max-epochs" in report
    assert "the disk would be full" in report
    assert "steps" not in [line.split()[-1] for line in report.splitlines()]


def test_another_tokenizer_is_found(world: World) -> None:
    text, tokenizer = world.folder / "other.jsonl", world.folder / "other.model"
    write_text(text, seed=2)
    make_corpus(world.runner, text, tokenizer, VOCAB_SIZE, world.folder / "other")
    flags = ["--tokenizer-model", tokenizer, "--global-batch-size", 16]
    status, report = rehearse(world, *PD_STAR, *flags, nodes=1, options=("--max-epochs", "9"))
    assert status == 1, report
    assert "mistakes: 1" in report and "was dumped with another tokenizer" in report

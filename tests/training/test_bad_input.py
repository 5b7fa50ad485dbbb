"""Whatever is wrong with the flags or files stops a run before training, with one sentence."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import (
    LAYOUTS,
    ROOT,
    VOCAB_SIZE,
    Outcome,
    World,
    environment,
    make_corpus,
    write_corpus,
    write_text,
)


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert all(outcome.statuses), outcome.log[-2000:]
    assert "Traceback" not in outcome.log, outcome.log[-4000:]
    error = re.split(r"\nerror(?: \(rank \d+\))?: ", "\n" + outcome.log)[-1]
    for word in words:
        assert word in error, error


FLAGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown loss": (["--pd-loss", "cosine"], ("--pd-loss", "kld")),
    "unknown recipe": (["--pd-recipe", "pd-moon"], ("--pd-recipe", "pd-star")),
    "p of 0": (["--pd-top-p", "0"], ("--pd-top-p", "(0, 1]")),
    "p above 1": (["--pd-top-p", "1.5"], ("--pd-top-p", "(0, 1]")),
    "k of 0": (["--pd-top-k", "0"], ("--pd-top-k", "1 or more")),
    "alpha below 0": (["--pd-alpha", "-0.1"], ("--pd-alpha", "[0, 1]")),
    "alpha above 1": (["--pd-alpha", "1.1"], ("--pd-alpha", "[0, 1]")),
    "temperature of 0": (["--pd-temperature", "0"], ("--pd-temperature",)),
    "chunk of 0": (["--pd-loss-chunk-tokens", "0"], ("--pd-loss-chunk-tokens",)),
    "chunk of a word": (["--pd-loss-chunk-tokens", "some"], ("--pd-loss-chunk-tokens", "auto")),
    "LM only from a teacher": (
        ["--pd-lm-only", "--pd-loss-chunk-tokens", "8", "--pd-alpha", "0.5", "--pd"],
        ("--pd-lm-only", "and --pd-alpha, --pd would distil", "drop"),
    ),
    "unused option": (["--pd-jsd-beta", "0.5"], ("--pd-jsd-beta", "--pd-loss jsd")),
    "schedule longer than the run": (
        ["--pd-alpha-schedule", "wsd", "--pd-alpha-warmup", "40", "--pd-alpha-decay", "9"],
        ("--pd-alpha-warmup", "train longer"),
    ),
    "random tokens": (["--pd", "--mock-data"], ("--mock-data", "--data-path")),
    "Megatron's own cached logits": (
        ["--pd", "--logits-load-dir", "logits"],
        ("--logits-load-dir", "drop the flag"),
    ),
    "more stores than corpora": (
        ["--pd-store", "a.pd", "b.pd"],
        ("2 stores for 1 training corpora", "--pd-store"),
    ),
    "an assertion of Megatron's": (
        ["--tensor-model-parallel-size", "2"],
        ("Megatron refuses the flags: world size (1) is not divisible", "arguments.py, line"),
    ),
    "an assertion of Megatron's without a text": (
        ["--micro-batch-size", "0"],
        ("Megatron refuses the flags: assert args.micro_batch_size > 0", "arguments.py, line"),
    ),
    "a file in place of flags": (["--yaml-cfg", "a.yaml"], ("--yaml-cfg", "as flags")),
    "a data loader of one's own": (
        ["--dataloader-type", "external"],
        ("external", "drop"),
    ),
    "a restart in the process": (
        ["--inprocess-restart"],
        ("torchrun --max-restarts",),
    ),
    "no validation split": (["--split", "100,0,0", "--eval-iters", "1"], ("no validation split",)),
    **{
        f"no support of {flags[0]}": (flags, (flags[0], "drop the flag"))
        for flags in (
            ["--sft"],
            ["--fim-data"],
            ["--dataloader-inter-document-masking"],
            ["--hybrid-context-parallel"],
            ["--logits-save-dir", "logits"],
            ["--hybrid-layer-pattern", "M*"],
            ["--perform-rl-step"],
        )
    },
    "a graph of the whole iteration": (
        ["--pd", "--cuda-graph-impl", "full_iteration"],
        ("--cuda-graph-impl full_iteration", "use local or transformer_engine"),
    ),
    "chunks and a gradient for later": (
        ["--pd", "--pd-loss-chunk-tokens", "64", "--defer-embedding-wgrad-compute"],
        ("--defer-embedding-wgrad-compute", "--pd-loss-chunk-tokens", "drop one"),
    ),
    "asynchronous checkpoints without their package": (
        ["--save", "x", "--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "nvrx"],
        ("--async-save", "nvidia-resiliency-ext", "--async-strategy mcore"),
    ),
    "fault tolerance without its package": (
        ["--enable-ft-package"],
        ("--enable-ft-package", "nvidia-resiliency-ext"),
    ),
    "local checkpoints without their package": (
        ["--non-persistent-ckpt-type", "local"],
        ("--non-persistent-ckpt-type local", "nvidia-resiliency-ext"),
    ),
    "multi-latent attention on a CPU": (
        ["--multi-latent-attention"],
        ("--multi-latent-attention needs a GPU", "drop the flag"),
    ),
    "Megatron's FSDP on a CPU": (["--use-megatron-fsdp"], ("--use-megatron-fsdp needs a GPU",)),
    "PyTorch's FSDP on a CPU": (["--use-torch-fsdp2"], ("--use-torch-fsdp2 needs a GPU",)),
    "the optimizer on the host on a CPU": (
        ["--optimizer-cpu-offload"],
        ("--optimizer-cpu-offload needs a GPU", "on the host already"),
    ),
    "an optimizer that is not installed": (
        ["--optimizer", "lion"],
        ("--optimizer lion", "emerging-optimizers"),
    ),
    "sequence parallelism on a CPU": (
        ["--pd", "--sequence-parallel"],
        ("--sequence-parallel", "CPU"),
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, world: World) -> None:
    flags, words = FLAGS[case]
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
    assert_refused(outcome, *words)


def test_missing_store_and_corpus(world: World) -> None:
    nowhere = world.folder / "nowhere"
    for flags, words in (
        (["--pd-store", nowhere], (str(nowhere), "megatron-pd dump")),
        (["--pd", "--data-path", nowhere], (f"{nowhere}.bin", "--data-path")),
    ):
        outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags), ranks=2)
        assert_refused(outcome, *words)


@pytest.fixture(scope="module")
def elsewhere(world: World) -> World:
    """Another corpus with a tokenizer of its own, of another size."""
    text = world.folder / "elsewhere.jsonl"
    write_text(text, seed=2)
    tokenizer, corpus = world.folder / "elsewhere.model", world.folder / "elsewhere"
    make_corpus(world.runner, text, tokenizer, VOCAB_SIZE - 5, corpus)
    return World(world.runner, world.folder, tokenizer, corpus)


def test_store_of_another_corpus(world: World, elsewhere: World) -> None:
    store = f"{world.corpus}.pd"
    flags = world.training_flags("--pd-store", store, corpus=elsewhere.corpus)
    assert_refused(world.runner.run("megatron_pd.pretrain", flags), store, "corpus")


def test_store_of_another_vocabulary(world: World, elsewhere: World) -> None:
    flags = [*world.training_flags("--pd"), "--tokenizer-model", elsewhere.tokenizer]
    outcome = world.runner.run("megatron_pd.pretrain", flags)
    assert_refused(outcome, f"{world.corpus}.pd", str(VOCAB_SIZE), str(VOCAB_SIZE - 5))


def test_store_of_another_tokenizer(world: World) -> None:
    text, tokenizer = world.folder / "third.jsonl", world.folder / "third.model"
    write_text(text, seed=3)
    make_corpus(world.runner, text, tokenizer, VOCAB_SIZE, world.folder / "third")
    flags = [*world.training_flags("--pd"), "--tokenizer-model", tokenizer]
    outcome = world.runner.run("megatron_pd.pretrain", flags)
    assert_refused(outcome, f"{world.corpus}.pd", "another tokenizer", "--tokenizer-model")


def test_store_of_the_other_kind(world: World, sampled_store: Path) -> None:
    for flags, words in (
        (["--pd-tail", "sampled"], (f"{world.corpus}.pd", "--dump-sampled")),
        (
            ["--pd-store", sampled_store],
            (str(sampled_store), "20 random draws", "--pd-tail sampled"),
        ),
    ):
        outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
        assert_refused(outcome, *words)


def test_store_without_the_statistic_that_a_temperature_reads(
    world: World, teacher: Path, tmp_path: Path
) -> None:
    store = tmp_path / "plain.pd"
    world.dump(teacher, "--dump-store", store)
    flags = ["--pd-store", store, "--pd-adaptive-temperature", "normkd"]
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
    assert_refused(outcome, str(store), "'std'", "--dump-statistics")


def test_truncated_store(world: World) -> None:
    store = world.folder / "truncated.pd"
    shutil.copytree(f"{world.corpus}.pd", store)
    shard = max(store.iterdir(), key=lambda file: file.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size * 2 // 3)
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags("--pd-store", store))
    assert_refused(outcome, shard.name)


def test_damaged_blocks(world: World) -> None:
    """Where nothing shows at the start, the thread that fetches the rows says it."""
    store = world.folder / "damaged.pd"
    shutil.copytree(f"{world.corpus}.pd", store)
    shard = max(store.iterdir(), key=lambda file: file.stat().st_size)
    damaged = bytearray(shard.read_bytes())
    for byte in range(len(damaged) // 20, len(damaged) * 2 // 3, len(damaged) // 20):
        damaged[byte] ^= 1
    shard.write_bytes(damaged)
    outcome = world.runner.run("unsampled_job", world.training_flags("--pd-store", store))
    assert "before the start of training step" in outcome.log
    assert_refused(outcome, shard.name, "is damaged", "dump its documents again")


def test_dump_flags(world: World, teacher: Path) -> None:
    for flag, value, *more in (
        ("--dump-top-p", 0),
        ("--dump-top-k", 0),
        ("--dump-sampled", 0),
        ("--dump-sampled", 5, "--dump-top-k", 9),
        ("--dump-overlap", 64),
    ):
        store = world.folder / "never.pd"
        flags = world.dump_flags(teacher, "--dump-store", store, flag, value, *more)
        assert_refused(world.runner.run("megatron_pd.teacher.megatron", flags), flag)
        assert not store.exists()
    flags = world.dump_flags(world.folder / "no-checkpoint")
    assert_refused(
        world.runner.run("megatron_pd.teacher.megatron", flags), "--load", "no-checkpoint"
    )


def test_evaluate_flags(world: World, teacher: Path) -> None:
    for overlap in (-1, 64):
        argv = ["evaluate", *world.dump_flags(teacher, "--evaluate-overlap", overlap)]
        outcome = world.runner.run("megatron_pd.cli", argv)
        assert_refused(outcome, f"--evaluate-overlap is {overlap}", "--seq-length (64)")


def test_replicas_that_would_wait_for_each_other(world: World, teacher: Path) -> None:
    argv = ["evaluate", *world.dump_flags(teacher, "--expert-model-parallel-size", 2)]
    outcome = world.runner.run("megatron_pd.cli", argv, ranks=2)
    assert_refused(outcome, "--expert-model-parallel-size 2", "--pipeline-model-parallel-size")


@pytest.mark.parametrize("command", ["dump", "evaluate"])
def test_interleaved_stages_in_a_pass_over_documents(
    command: str, world: World, teacher: Path
) -> None:
    ranks, flags = LAYOUTS["pp2 interleaved"]
    outcome = world.runner.run(
        "megatron_pd.cli", [command, *world.dump_flags(teacher, *flags)], ranks
    )
    assert_refused(outcome, "interleaved", "--num-layers-per-virtual-pipeline-stage")


def test_evaluate_without_a_token_to_predict(world: World, teacher: Path) -> None:
    corpus = world.folder / "single-tokens"
    write_corpus(corpus, [np.array([7]), np.array([8])])
    argv = ["evaluate", *world.dump_flags(teacher, corpus=corpus)]
    assert_refused(world.runner.run("megatron_pd.cli", argv, 2), str(corpus), "nothing to predict")


def test_the_command_itself_under_torchrun(world: World) -> None:
    """As a user runs it: one sentence from all ranks together, and a status that is not 0."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "-m", "megatron_pd.pretrain"]
    found = subprocess.run(
        [*command, *world.training_flags("--pd-store", world.folder / "nowhere")],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert found.returncode != 0
    assert len(re.findall(r"^error(?: \(rank 1\))?: ", found.stderr, re.MULTILINE)) == 1
    assert str(world.folder / "nowhere") in found.stderr
    assert "elapsed time per iteration" not in found.stdout


def test_a_split_without_a_token(world: World) -> None:
    corpus = world.folder / "empty-at-the-end"
    write_corpus(corpus, [np.arange(3, 90) for _ in range(9)] + [np.zeros(0, np.int64)])
    outcome = world.runner.run(
        "megatron_pd.pretrain",
        world.training_flags(
            *("--data-path", corpus, "--split", "90,10,0", "--eval-iters", "1"),
        ),
    )
    assert_refused(outcome, f"The validation split of {corpus} has no token", "documents 9 to 10")


def test_counts_that_are_not_the_corpus_own(world: World, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    for content, words in (
        ({str(world.corpus): [1, 2]}, ("has [1, 2] for", "make the file again")),
        ({}, ("has None for", "make the file again")),
        ([], ("is not a JSON object",)),
    ):
        counts.write_text(json.dumps(content))
        outcome = world.runner.run(
            "megatron_pd.pretrain",
            world.training_flags("--per-dataset-sequences-path", counts),
        )
        assert_refused(outcome, f"--per-dataset-sequences-path {counts}", *words)

"""What a run checks of its stores: on every machine, and that there is something to distil from."""

import shutil
from pathlib import Path

import numpy as np
from few_descriptors_job import DESCRIPTORS
from jobs import World, write_corpus
from test_bad_input import assert_refused

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows


def copy_corpus(world: World, name: str) -> Path:
    prefix = world.folder / name
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{world.corpus}{suffix}", f"{prefix}{suffix}")
    return prefix


def run_with_second_node(world: World, original: str, replacement: Path, *flags: str):
    argv = [original, replacement, *world.training_flags(*flags)]
    return world.runner.run("second_node_job", argv, ranks=2)


def test_another_corpus_on_the_second_machine(world: World) -> None:
    """As many documents, as long, with one token changed in each."""
    prefix = copy_corpus(world, "wrong")
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    lengths = MegatronCorpus(str(prefix)).document_lengths
    tokens[np.cumsum(lengths) - lengths] ^= 1
    tokens.tofile(f"{prefix}.bin")
    store = f"{world.corpus}.pd"
    (world.folder / "wrong.pd").symlink_to(store)
    outcome = run_with_second_node(world, str(world.corpus), prefix, "--pd")
    assert_refused(outcome, "has other tokens in this corpus")


def test_another_store_on_the_second_machine(world: World, teacher: Path) -> None:
    other = world.folder / "other.pd"
    world.dump(teacher, "--dump-store", other, "--dump-top-k", 20)
    store = f"{world.corpus}.pd"
    outcome = run_with_second_node(world, store, other, "--pd-store", store)
    assert_refused(outcome, str(other), "another store", f"{LogitStore(store).store_id:016x}")


def write_store(world: World, name: str, taught: list[int], **options) -> Path:
    """A store whose documents `taught` have one entry in every row but the last."""
    corpus = MegatronCorpus(str(world.corpus))
    source = LogitStore(f"{world.corpus}.pd")
    path = world.folder / name
    with LogitStoreWriter(
        path,
        vocab_size=source.vocab_size,
        document_lengths=corpus.document_lengths,
        metadata={"tokenizer": source.metadata["tokenizer"]},
        **options,
    ) as writer:
        for document, length in enumerate(corpus.document_lengths.tolist()):
            rows = TeacherRows.empty(length, 1)
            if document in taught:
                rows.ids[:-1], rows.logprobs[:-1], rows.counts[:-1] = 5, -0.1, 1
            writer.append(document, 0, rows)
    return path


def test_a_store_without_an_entry_is_refused(world: World) -> None:
    path = write_store(world, "nothing.pd", [], corpus=MegatronCorpus(str(world.corpus)))
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags("--pd-store", path))
    assert_refused(outcome, str(path), "no entry at all")


def test_few_taught_tokens_and_no_digests_are_told(world: World) -> None:
    path = write_store(world, "few.pd", [7])
    argv = world.training_flags("--pd-store", path, "--train-iters", 2, "--lr-wsd-decay-iters", 1)
    log = world.runner.check("megatron_pd.pretrain", [*argv, "--lr-warmup-iters", "0"])
    assert f"% of the tokens of {path} have a teacher" in log
    assert f"{path} holds no digests" in log


def test_a_statistic_that_is_missing_anywhere_is_refused(world: World) -> None:
    path = write_store(world, "bare.pd", [290], corpus=MegatronCorpus(str(world.corpus)))
    flags = ("--pd-store", path, "--pd-adaptive-temperature", "adakd-h")
    outcome = world.runner.run("megatron_pd.pretrain", world.training_flags(*flags))
    assert_refused(outcome, str(path), "'entropy'", "--dump-statistics")


def test_more_shards_than_files_that_may_be_open(world: World) -> None:
    """A shard a document, all of them read by one epoch of training."""
    rng = np.random.default_rng()
    documents = [rng.integers(0, 300, 33, np.uint16) for _ in range(641)]
    prefix = world.folder / "shards"
    write_corpus(prefix, documents)
    corpus = MegatronCorpus(str(prefix))
    source = LogitStore(f"{world.corpus}.pd")
    for document in range(len(documents)):
        rows = TeacherRows.empty(33, 1)
        rows.counts[:-1] = 1
        rows.ids[:-1, 0] = documents[document][1:]
        with LogitStoreWriter(
            f"{prefix}.pd",
            vocab_size=source.vocab_size,
            document_lengths=corpus.document_lengths,
            metadata={"tokenizer": source.metadata["tokenizer"]},
            codec="exact",
            corpus=corpus,
            documents=range(document, document + 1),
        ) as writer:
            writer.append(document, 0, rows)
    assert len(list((world.folder / "shards.pd").glob("*.shard"))) == 641 > 4 * DESCRIPTORS
    flags = ["--train-iters", 41, "--pd", "--pd-alpha", 1]  # 41 * 8 samples of 64 tokens
    training = world.training_flags(*flags, corpus=prefix)
    log = world.runner.check(
        "few_descriptors_job", ["verify", f"{prefix}.pd", "--corpus", prefix, "--", *training]
    )
    assert "intact" in log and "iteration       41/" in log

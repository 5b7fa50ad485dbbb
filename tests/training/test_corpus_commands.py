"""The commands that look at a store beside its corpus and its tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from jobs import World
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.store import LogitStore, StoreError


@pytest.fixture
def another_corpus(world: World, tmp_path: Path) -> Path:
    """The corpus with another token in the middle of its longest document."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{world.corpus}{suffix}", tmp_path / f"another{suffix}")
    corpus = IndexedDataset(str(tmp_path / "another"))
    longest = int(corpus.sequence_lengths.argmax())
    tokens = np.memmap(tmp_path / "another.bin", corpus.index.dtype, "r+")
    tokens[int(corpus.sequence_lengths[:longest].sum()) + 20] ^= 1
    return tmp_path / "another"


def test_verify_compares_every_token(world: World, another_corpus: Path) -> None:
    words = ["verify", f"{world.corpus}.pd", "--corpus"]
    assert "intact" in world.runner.check("megatron_pd.cli", [*words, world.corpus])
    found = world.runner.run("megatron_pd.cli", [*words, another_corpus])
    longest = int(LogitStore(f"{world.corpus}.pd").document_lengths.argmax())
    assert found.statuses == [1]
    assert f"document {longest} has other tokens" in found.log


def test_inspect_shows_the_corpus_as_text(world: World) -> None:
    store, corpus = LogitStore(f"{world.corpus}.pd"), IndexedDataset(str(world.corpus))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(world.tokenizer))
    document = int(np.flatnonzero(corpus.sequence_lengths > 8)[-1])
    first, count = 2, 5
    words = ["inspect", f"{world.corpus}.pd", "--document", document, "--offset", first]
    words += ["--tokens", count, "--top", 3, "--tokenizer-model", world.tokenizer]
    log = world.runner.check("megatron_pd.cli", [*words, "--json"])
    figures = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    rows, tokens = store.read(document, first, count), corpus[document]
    assert len(figures["window"]) == count
    for row, shown in enumerate(figures["window"]):
        token, following = tokens[first + row : first + row + 2].tolist()
        assert (shown["token"], shown["next_token"]) == (token, following)
        assert (shown["text"], shown["next_text"]) == (
            pieces.decode([token]),
            pieces.decode([following]),
        )
        ids = rows.ids[row, : min(3, rows.counts[row])].tolist()
        assert [c["id"] for c in shown["candidates"]] == ids
        assert [c["text"] for c in shown["candidates"]] == [pieces.decode([i]) for i in ids]

    *_, last = world.runner.check("megatron_pd.cli", words).splitlines()
    probabilities = np.exp(rows.logprobs[-1, : len(ids)])
    expected = [
        f"{pieces.decode([i])!r}{'*' if i == following else ''} {p:.3f}"
        for i, p in zip(ids, probabilities, strict=True)
    ]
    assert last.endswith("  ".join(expected)) and repr(pieces.decode([token])) in last


def test_inspect_says_that_the_tokenizer_is_another_one(world: World, tmp_path: Path) -> None:
    model = tmp_path / "another.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words", "and others"] * 9),
        model_prefix=str(model.with_suffix("")),
        vocab_size=20,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    words = ["inspect", f"{world.corpus}.pd", "--tokenizer-model", model, "--document", 0]
    log = world.runner.run("megatron_pd.cli", [*words, "--tokens", 1, "--top", 1]).log
    assert f"{model} is not the tokenizer that the store was made with" in log


def test_a_store_from_parquet_belongs_to_the_corpus(
    world: World, another_corpus: Path, tmp_path: Path
) -> None:
    words = ["convert", "to-parquet", f"{world.corpus}.pd", "--output", tmp_path / "parquet"]
    world.runner.check("megatron_pd.cli", words)
    words = ["convert", "from-parquet", tmp_path / "parquet", "--codec", "exact"]
    words += ["--output", tmp_path / "again.pd", "--corpus", world.corpus]
    world.runner.check("megatron_pd.cli", words)
    again, store = LogitStore(tmp_path / "again.pd"), LogitStore(f"{world.corpus}.pd")
    again.check_corpus(MegatronCorpus(str(world.corpus)), full=True)
    with pytest.raises(StoreError, match="has other tokens"):
        again.check_corpus(MegatronCorpus(str(another_corpus)), full=True)
    for document in range(store.num_documents):
        found, expected = again.read(document), store.read(document)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)

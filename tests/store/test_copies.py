"""Stores made of stores hold the same rows, whatever the cut, the codec and the interruptions."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.cli import main
from megatron_pd.distill.targets import TeacherTargets, truncate
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.recode import cut_rows
from megatron_pd.store.admin.verify import verify_store

VOCAB = 211


def write(
    path: Path,
    rng,
    corpus,
    documents: list[range],
    codec="compact",
    bound=True,
    metadata=None,
) -> None:
    """Shards of random rows for some documents of a corpus."""
    for shard in documents:
        with LogitStoreWriter(
            path,
            vocab_size=VOCAB,
            document_lengths=corpus.document_lengths,
            metadata=metadata or {"teacher": "random", "top_k": 8},
            codec=codec,
            corpus=corpus if bound else None,
            statistics=["label_logprob", "entropy"],
            documents=shard,
        ) as writer:
            for document in shard:
                length = int(corpus.document_lengths[document])
                writer.append(document, 0, random_rows(rng, length, VOCAB, 8, statistics=True))


def rows_of(path: Path, documents=None) -> list[TeacherRows]:
    store = LogitStore(path, allow_partial=True)
    return [store.read(d) for d in documents or range(store.num_documents)]


def assert_same(found: list[TeacherRows], expected: list[TeacherRows]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_rows_equal(a, b)
        for name, values in b.statistics.items() if len(b) else ():
            np.testing.assert_array_equal(a.statistics[name], values)


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-pd", *map(str, words)])
    assert main() == 0


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_merge_of_one_corpus(tmp_path, rng, monkeypatch, codec):
    corpus = RandomCorpus(rng, 30, VOCAB)
    write(tmp_path / "a", rng, corpus, [range(0, 7), range(20, 30)], codec)
    write(tmp_path / "b", rng, corpus, [range(7, 20)], codec)
    command(monkeypatch, "merge", tmp_path / "b", tmp_path / "a", "--output", tmp_path / "c")
    expected = [*rows_of(tmp_path / "a", range(7)), *rows_of(tmp_path / "b", range(7, 20))]
    assert_same(rows_of(tmp_path / "c"), expected + rows_of(tmp_path / "a", range(20, 30)))
    LogitStore(tmp_path / "c").check_corpus(corpus, full=True)
    assert verify_store(tmp_path / "c") == [] and len(list((tmp_path / "c").iterdir())) == 2


def test_half_a_store_stays_bound(tmp_path, rng, monkeypatch):
    """Whatever it is joined with, and in every copy of that."""
    corpus = RandomCorpus(rng, 30, VOCAB)
    write(tmp_path / "bound", rng, corpus, [range(0, 7), range(20, 30)])
    write(tmp_path / "unbound", rng, corpus, [range(7, 20)], bound=False)
    parts = tmp_path / "bound", tmp_path / "unbound"
    command(monkeypatch, "merge", *parts, "--output", tmp_path / "m")
    for name, *words in (
        ("recode", "recode", tmp_path / "m", "--shard-tokens", 10_000),
        ("split", "split", tmp_path / "m", "--shard-tokens", 10_000),
        ("parquet", "convert", "to-parquet", tmp_path / "m"),
        ("back", "convert", "from-parquet", tmp_path / "parquet"),
        ("m", "merge", *parts),  # is there
    ):
        command(monkeypatch, *words, "--output", tmp_path / name)
        if name == "parquet":
            continue
        store = LogitStore(tmp_path / name)
        assert store.unbound_documents() == [range(7, 20)]
        store.check_corpus(corpus, full=True)
        for document in np.flatnonzero(corpus.document_lengths).tolist():
            other = copy.deepcopy(corpus)
            other._tokens[document][-1] ^= 1
            if document in range(7, 20):
                store.check_corpus(other, full=True)
            else:
                with pytest.raises(StoreError, match=f"document {document} has other tokens"):
                    store.check_corpus(other, full=True)


def test_two_teachers_are_never_in_one_store(tmp_path, rng, monkeypatch, capsys):
    """A store that doesn't know its teacher's weights joins one that does, on request."""
    corpus = RandomCorpus(rng, 9, VOCAB)
    for name, documents, fingerprint in (
        ("a", range(0, 4), {"fingerprint": "aa"}),
        ("b", range(4, 9), {"fingerprint": "bb"}),
        ("c", range(4, 9), {}),
        ("d", range(0, 4), {}),
    ):
        write(tmp_path / name, rng, corpus, [documents], metadata={"path": name, **fingerprint})
    with pytest.raises(SystemExit):
        command(
            monkeypatch, "merge", tmp_path / "a", tmp_path / "b", "--ignore-metadata",
            "--output", tmp_path / "out",
        )  # fmt: skip
    assert "with the fingerprint bb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for parts in ("ac", "bd"):
        words = (*(tmp_path / name for name in parts), "--ignore-metadata")
        command(monkeypatch, "merge", *words, "--output", tmp_path / parts)
        assert LogitStore(tmp_path / parts).metadata["fingerprint"] == 2 * parts[0]


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_split_into_stores_and_concatenated_again(tmp_path, rng, monkeypatch, capsys, codec):
    corpus = RandomCorpus(rng, 30, VOCAB)
    write(tmp_path / "c.pd", rng, corpus, [range(0, 11), range(11, 30)], codec)
    expected = rows_of(tmp_path / "c.pd")
    cuts = sorted(rng.choice(np.arange(1, 30), 2, replace=False).tolist())
    words = ("--at", *cuts, "--workers", 2, "--shard-tokens", 100, "--json")
    command(monkeypatch, "split", tmp_path / "c.pd", "--output", tmp_path / "s.pd", *words)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    parts = [tmp_path / f"s-{number}.pd" for number in range(3)]
    for path, figures, (first, stop) in zip(
        parts, told, itertools.pairwise([0, *cuts, 30]), strict=True
    ):
        assert figures["documents"] == stop - first and figures["path"] == str(path)
        assert_same(rows_of(path), expected[first:stop])
    command(monkeypatch, "merge", *parts, "--concatenate", "--output", tmp_path / "m")
    assert_same(rows_of(tmp_path / "m"), expected)
    LogitStore(tmp_path / "m").check_corpus(corpus, full=True)
    command(monkeypatch, "split", tmp_path / "m", "--output", tmp_path / "n", "--shard-tokens", 64)
    assert len(list((tmp_path / "n").glob("*.shard"))) > 5
    assert_same(rows_of(tmp_path / "n"), expected)


def test_merge_refuses_what_does_not_fit(tmp_path, rng, monkeypatch):
    corpus, other = RandomCorpus(rng, 9, VOCAB), RandomCorpus(rng, 9, VOCAB, mean=90)
    write(tmp_path / "a", rng, corpus, [range(0, 4)])
    write(tmp_path / "b", rng, corpus, [range(3, 9)])
    write(tmp_path / "c", rng, corpus, [range(5, 9)])
    write(tmp_path / "d", rng, other, [range(0, 9)])
    for second, words, sentence in [
        ("b", (), "document 3 is in another of the stores"),
        ("c", (), "Documents 4 to 4 are in none of the stores"),
        ("d", (), "are of different corpora"),
        ("d", ("--concatenate",), "the store is not complete"),
    ]:
        with pytest.raises(SystemExit) as left:
            command(
                monkeypatch, "merge", tmp_path / "a", tmp_path / second, *words,
                "--output", tmp_path / "out",
            )  # fmt: skip
        assert left.value.code == 1, sentence
    assert not (tmp_path / "out").exists()


def test_cut_is_the_truncation_of_training(rng):
    rows = random_rows(rng, 200, VOCAB, 30)
    for top_p, top_k in [(0.6, None), (0.9, 5), (None, 3), (1.0, 100)]:
        cut = cut_rows(rows, top_p, top_k)
        tensors = map(torch.from_numpy, (rows.ids, rows.logprobs, rows.counts))
        expected = truncate(TeacherTargets(*tensors), top_p, top_k)
        np.testing.assert_array_equal(cut.counts, expected.counts)
        assert_rows_equal(
            cut,
            TeacherRows(*(t.numpy() for t in (expected.ids, expected.logprobs, expected.counts))),
        )


def test_recode_cuts_and_changes_the_codec(tmp_path, rng, monkeypatch):
    corpus = RandomCorpus(rng, 20, VOCAB)
    write(tmp_path / "a", rng, corpus, [range(0, 20)])
    words = ("--codec", "exact", "--top-p", 0.7, "--top-k", 5)
    command(monkeypatch, "recode", tmp_path / "a", "--output", tmp_path / "b", *words)
    assert_same(rows_of(tmp_path / "b"), [cut_rows(r, 0.7, 5) for r in rows_of(tmp_path / "a")])
    store = LogitStore(tmp_path / "b")
    assert store.metadata == {"teacher": "random", "top_k": 5, "top_p": 0.7, "codec": "exact"}
    assert store.codecs == {"exact"}
    command(monkeypatch, "recode", tmp_path / "b", "--output", tmp_path / "c", "--codec", "compact")
    assert LogitStore(tmp_path / "c").nbytes < 0.6 * store.nbytes
    for words in (("--output", tmp_path / "a"), ("--output", tmp_path / "d", "--top-p", 2)):
        with pytest.raises(SystemExit):
            command(monkeypatch, "recode", tmp_path / "a", *words)
    with pytest.raises(SystemExit):  # another cut into what is there
        command(monkeypatch, "recode", tmp_path / "a", "--output", tmp_path / "b", "--top-k", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_recode_goes_on(tmp_path, rng, number):
    lengths = rng.integers(1, 400, 200)
    rows = random_rows(rng, 1001, VOCAB, 8)
    with LogitStoreWriter(
        tmp_path / "a", vocab_size=VOCAB, document_lengths=lengths, metadata={}, codec="exact"
    ) as writer:
        for document, length in enumerate(lengths.tolist()):
            first = int(rng.integers(0, 1001 - length))
            writer.append(document, 0, rows[first : first + length - 1])
            writer.append(document, length - 1, TeacherRows.empty(1))
    words = ["recode", tmp_path / "a", "--output", tmp_path / "b", "--codec", "compact"]
    words = [sys.executable, "-m", "megatron_pd.cli", *words, "--workers", "2"]
    words += ["--shard-tokens", "10000"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "b").exists() and child.poll() is None:
        time.sleep(0.001)
    time.sleep(float(rng.uniform(0, 0.2)))
    os.kill(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert "Traceback" not in said
    time.sleep(0.3 if number == signal.SIGKILL else 0)  # its workers notice
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = LogitStore(tmp_path / "a")
    assert verify_store(tmp_path / "b") == []
    for found, document in zip(rows_of(tmp_path / "b"), range(200), strict=True):
        assert_rows_equal(found, expected.read(document), exact=False)


def test_damaged_source_is_one_sentence(tmp_path, rng, monkeypatch, capsys):
    corpus = RandomCorpus(rng, 20, VOCAB)
    write(tmp_path / "a", rng, corpus, [range(0, 20)])
    shard = next((tmp_path / "a").glob("*.shard"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for words in (
        ("merge", tmp_path / "a", "--output", tmp_path / "b"),
        ("recode", tmp_path / "a", "--output", tmp_path / "c"),
        ("stats", tmp_path / "a"),
        ("stats", tmp_path / "nowhere"),
        ("split", shard, "--output", tmp_path / "d"),
    ):
        with pytest.raises(SystemExit) as left:
            command(monkeypatch, *words)
        said = capsys.readouterr().err
        assert left.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    with pytest.raises(StoreError):
        LogitStore(tmp_path / "b")

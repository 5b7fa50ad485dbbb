"""What a caller or a command line gets wrong is named, and nothing is written or read instead."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows, format

VOCAB = 50
LENGTHS = np.array([3, 0, 5])


def writer(path: Path, **settings) -> LogitStoreWriter:
    given = {
        "vocab_size": VOCAB,
        "document_lengths": LENGTHS,
        "metadata": {"teacher": "random"},
        "codec": "exact",
    }
    return LogitStoreWriter(path, **(given | settings))


def write(path: Path, rng, **settings) -> list[TeacherRows]:
    rows = [random_rows(rng, int(length), VOCAB, 4) for length in LENGTHS]
    if "draws" in settings:
        for part in rows:
            part.ids[:-1, :2], part.ids[:-1, 2:], part.counts[:-1] = [5, 7], -1, 2
            part.logprobs[:-1, :2], part.logprobs[:-1, 2:] = np.log([0.75, 0.25]), 0
    with writer(path, **settings) as store:
        for document, part in enumerate(rows):
            store.append(document, 0, part)
    return rows


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"statistics": ["odd"]}, r"unknown statistics \['odd'\]"),
        ({"vocab_size": 0}, "vocab_size 0 is not in"),
        ({"vocab_size": (1 << 24) + 1}, "vocab_size 16777217 is not in"),
        ({"document_lengths": np.array([3, -1])}, "document_lengths must be"),
        ({"document_lengths": np.ones((2, 2), int)}, "document_lengths must be"),
        ({"codec": "zip"}, "'zip'.*compact.*exact"),
        ({"codec": "compact", "value_bits": 1}, "value_bits 1 is not in"),
        ({"kind": "sampled", "draws": 1 << 16}, "65536 draws"),
        ({"kind": "sampled"}, "'sampled' with draws 0"),
        ({"draws": 7}, "'top' with draws 7"),
        ({"documents": range(1, 4)}, "not a contiguous part of 3 documents"),
        ({"documents": range(0, 3, 2)}, "not a contiguous part of 3 documents"),
    ],
)
def test_settings_of_a_writer(settings: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=sentence):
        writer(tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_rows_that_are_out_of_place(tmp_path: Path, rng: np.random.Generator) -> None:
    """A refused append changes nothing: the right rows still go in."""
    rows = random_rows(rng, 3, VOCAB, 4, statistics=True)
    while not rows.counts[1]:  # rows without entries may lack statistics
        rows = random_rows(rng, 3, VOCAB, 4, statistics=True)
    plain = TeacherRows(rows.ids, rows.logprobs, rows.counts)
    odd = TeacherRows(rows.ids, rows.logprobs, rows.counts, {"odd": rows.logprobs[:, 0]})
    declared = ("label_logprob", "entropy")
    with writer(tmp_path / "s", documents=range(0, 2), statistics=declared) as part:
        for document, offset, given, sentence in (
            (2, 0, rows, "document 2 is not in this shard, which holds 0 to 1"),
            (0, 1, rows[:2], "the next one is 0, but rows from 1 were appended"),
            (0, 0, random_rows(rng, 5, VOCAB, 4), "rows 0 to 4 appended, but it has 3 tokens"),
            (1, 0, rows[:1], "rows 0 to 0 appended, but it has 0 tokens"),
            (0, 0, odd, "unknown statistics .'odd'"),
        ):
            with pytest.raises(StoreError, match=sentence):
                part.append(document, offset, given)
        part.append(0, 0, rows[:1])
        with pytest.raises(StoreError, match="rows come with statistics"):
            part.append(0, 1, plain[1:])
        part.append(0, 1, rows[1:])
    with pytest.raises(StoreError, match="the shard is finished"):
        part.append(0, 3, rows[:1])
    assert_rows_equal(LogitStore(tmp_path / "s", allow_partial=True).read(0), rows)


def test_a_store_that_is_closed_too_early(tmp_path: Path, rng: np.random.Generator) -> None:
    begun = writer(tmp_path)
    begun.append(2, 0, random_rows(rng, 2, VOCAB, 4))
    with pytest.raises(
        StoreError, match=r"2 of 3 documents are not complete, the first is document 0 with 0 of 3"
    ):
        begun.close()


def test_corpus_of_other_lengths(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus = RandomCorpus(rng, 3, VOCAB)
    rows = random_rows(rng, 3, VOCAB, 4)
    with (
        pytest.raises(StoreError, match=r"document 0: the corpus has \d+ tokens"),
        writer(tmp_path, corpus=corpus, document_lengths=corpus.document_lengths + 3) as store,
    ):
        store.append(0, 0, rows)
        store.flush()


def test_reads_that_are_out_of_place(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = write(tmp_path, rng)
    store = LogitStore(tmp_path)
    for place, sentence in (
        ((3,), "document 3 asked for, it has 3"),
        ((-1,), "document -1 asked for, it has 3"),
        ((0, 0, 4), "rows 0 to 3 of document 0 asked for, it has 3"),
        ((0, -1, 2), "rows -1 to 0 of document 0"),
        ((1, 0, 1), "of document 1 asked for, it has 0"),
    ):
        with pytest.raises(StoreError, match=sentence):
            store.read(*place)
    spans = np.array([(0, 0, 3)])
    buffers = np.zeros((3, 4), np.int32), np.zeros((3, 4), np.float32), np.zeros(3, np.int32)
    for index, wrong in (
        (0, np.zeros((3, 4), np.int64)),
        (1, np.zeros((3, 4))),
        (1, np.zeros((4, 3), np.float32).T),
        (2, np.zeros(3, np.float32)),
    ):
        given = [*buffers[:index], wrong, *buffers[index + 1 :]]
        with pytest.raises(StoreError, match=f"a buffer of {wrong.dtype}"):
            store.gather(spans, *given)
    with pytest.raises(StoreError, match=r"unknown row statistics \['odd'\]"):
        store.gather(spans, *buffers, out_statistics={"odd": np.zeros(3, np.float32)})
    store.gather(spans, *buffers)
    assert_rows_equal(TeacherRows(*buffers), rows[0])


def refusal(monkeypatch, capsys, *words) -> str:
    """The one sentence with which a command ends."""
    monkeypatch.setattr(sys, "argv", ["megatron-pd", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code in (1, 2) and said.count("error: ") == 1, said
    return said


def test_commands(tmp_path: Path, rng: np.random.Generator, monkeypatch, capsys) -> None:
    store, out = tmp_path / "s.pd", tmp_path / "out.pd"
    write(store, rng)
    write(tmp_path / "another.pd", rng, metadata={"teacher": "another"})
    write(tmp_path / "wider.pd", rng, vocab_size=VOCAB + 1)
    for bits in (9, 11):
        write(tmp_path / f"{bits}.pd", rng, codec="compact", value_bits=bits)
    write(tmp_path / "draws.pd", rng, kind="sampled", draws=4)
    for words, sentence in (
        (("split", store), "Say how to split"),
        (("split", store, "--parts", -1), "argument --parts: '-1'"),
        (("split", store, "--parts", "two"), "argument --parts: 'two'"),
        (("merge", store, "--shard-tokens", 0), "argument --shard-tokens: '0'"),
        (("inspect", store, "--document", 0, "--tokens", -1), "argument --tokens: '-1'"),
        (("inspect", store, "--document", 0, "--top", -1), "argument --top: '-1'"),
        (("stats", store, "--max-rows", 0), "argument --max-rows: '0'"),
        (("split", store, "--at", 2, 1), "rising document numbers between 1 and 2"),
        (("split", store, "--at", 3), "rising document numbers between 1 and 2"),
        (("split", store, "--shard-tokens", 9, "--output", store), "path"),
        (("merge", store, tmp_path / "another.pd", "--concatenate"), "has teacher 'another'"),
        (("merge", store, tmp_path / "wider.pd", "--concatenate"), "vocab_size 51"),
        (("merge", tmp_path / "9.pd", tmp_path / "11.pd", "--concatenate"), "9 and 11 value bits"),
        (("recode", store, "--top-k", 0), "--top-k is 0"),
        (("recode", store, "--top-p", 0), "--top-p is 0"),
        (("recode", tmp_path / "draws.pd", "--top-k", 2), "without --top-p and --top-k"),
        (("inspect", store, "--document", 3), "document 3"),
        (("inspect", store, "--document", 0, "--offset", 9), "--offset 9"),
    ):
        output = (
            () if words[0] in ("inspect", "stats") or "--output" in words else ("--output", out)
        )
        assert sentence in refusal(monkeypatch, capsys, *words, *output), words
    assert list(tmp_path.glob("out*")) == []


def test_a_store_of_another_release(tmp_path: Path, rng: np.random.Generator, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(format, "VERSION", format.VERSION + 1)
        write(tmp_path, rng)
        LogitStore(tmp_path).read(0)
    with pytest.raises(StoreError, match=rf"version {format.VERSION + 1}; this release"):
        LogitStore(tmp_path)

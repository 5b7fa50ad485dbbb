"""Parquet holds the same rows, and what others write as Parquet becomes a store."""

from __future__ import annotations

import builtins
import contextlib
import copy
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.cli import main
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin import parquet
from megatron_pd.store.admin.parquet import from_parquet, to_parquet

VOCAB = 131


@pytest.fixture
def corpus(rng):
    return RandomCorpus(rng, 25, VOCAB)


@pytest.fixture
def store(tmp_path, rng, corpus) -> LogitStore:
    with LogitStoreWriter(
        tmp_path / "a",
        vocab_size=VOCAB,
        document_lengths=corpus.document_lengths,
        metadata={"teacher": "random"},
        codec="exact",
        statistics=["label_logprob", "entropy"],
        corpus=corpus,
    ) as writer:
        for document, length in enumerate(corpus.document_lengths.tolist()):
            writer.append(document, 0, random_rows(rng, length, VOCAB, 7, statistics=True))
    return LogitStore(tmp_path / "a")


def assert_same(found: LogitStore, expected: LogitStore) -> None:
    np.testing.assert_array_equal(found.document_lengths, expected.document_lengths)
    assert (found.vocab_size, found.statistics) == (expected.vocab_size, expected.statistics)
    for document in range(expected.num_documents):
        a, b = found.read(document), expected.read(document)
        assert_rows_equal(a, b)
        for name, values in b.statistics.items():
            np.testing.assert_array_equal(a.statistics[name], values)


@pytest.mark.parametrize("bound", [False, True])
def test_round_trip_is_exact(tmp_path, store, corpus, bound):
    files = to_parquet(store, tmp_path / "p", file_rows=200, workers=2)
    assert len(files) > 2
    files[0].unlink()
    to_parquet(store, tmp_path / "p", file_rows=200)  # goes on: writes what is missing
    back = from_parquet(
        [tmp_path / "p"], tmp_path / "b", codec="exact", workers=2,
        corpus=corpus if bound else None,
    )  # fmt: skip
    assert_same(back, store)
    assert back.metadata == store.metadata
    np.testing.assert_array_equal(back.token_digests(range(25)), store.token_digests(range(25)))
    back.check_corpus(corpus, full=True)


def with_another_token(corpus: RandomCorpus, document: int) -> RandomCorpus:
    """The corpus with one token changed, all lengths as they were."""
    other = copy.deepcopy(corpus)
    tokens = other._tokens[document]
    tokens[len(tokens) // 2] = (tokens[len(tokens) // 2] + 1) % VOCAB
    return other


@pytest.mark.parametrize("with_corpus", [False, True])
def test_another_corpus_is_refused(tmp_path, rng, store, corpus, with_corpus):
    """By a proof that went through the files, however the store came back from them."""
    to_parquet(store, tmp_path / "p", file_rows=200)
    document = int(rng.choice(np.flatnonzero(corpus.document_lengths)))
    other = with_another_token(corpus, document)
    with pytest.raises(StoreError, match=rf"document {document} has other tokens"):
        if with_corpus:
            from_parquet([tmp_path / "p"], tmp_path / "b", corpus=other)
        else:
            from_parquet([tmp_path / "p"], tmp_path / "b").check_corpus(other, full=True)
    longer = copy.deepcopy(corpus)
    longer.document_lengths[document] += 1
    with pytest.raises(StoreError, match=rf"document {document} has \d+ rows, in --corpus"):
        from_parquet([tmp_path / "p"], tmp_path / "c", corpus=longer)
    longer.document_lengths = np.append(corpus.document_lengths, 5)
    with pytest.raises(StoreError, match="of a store of 25 documents, --corpus has 26"):
        from_parquet([tmp_path / "p"], tmp_path / "d", corpus=longer)


def test_files_without_digests_are_noted(tmp_path, rng, store, corpus):
    """And only those."""
    unbound = tmp_path / "u"
    with LogitStoreWriter(
        unbound, vocab_size=VOCAB, document_lengths=corpus.document_lengths, metadata={}
    ) as writer:
        for document, length in enumerate(corpus.document_lengths.tolist()):
            writer.append(document, 0, random_rows(rng, length, VOCAB, 7))
    to_parquet(LogitStore(unbound), tmp_path / "p")
    notes: list[str] = []
    back = from_parquet([tmp_path / "p"], tmp_path / "b", note=notes.append)
    assert not back.is_bound and len(notes) == 1 and "bound to no corpus" in notes[0]
    back = from_parquet([tmp_path / "p"], tmp_path / "c", corpus=corpus, note=notes.append)
    assert back.is_bound and "nothing tells whether --corpus" in notes[1]
    to_parquet(store, tmp_path / "q")
    from_parquet([tmp_path / "q"], tmp_path / "d", note=notes.append)
    assert len(notes) == 2


def test_schema_is_what_is_promised(tmp_path, store):
    to_parquet(store, tmp_path / "p")
    table = pq.read_table(tmp_path / "p")
    document = int(np.argmax(store.document_lengths))
    rows = store.read(document)
    own = table.filter(pa.compute.equal(table["document"], document))
    assert own["offset"].to_pylist() == list(range(len(rows)))
    assert own["ids"].to_pylist() == [
        r[:n].tolist() for r, n in zip(rows.ids, rows.counts, strict=True)
    ]
    assert table.schema.field("logprobs").type == pa.list_(pa.float32())
    assert table.schema.field("entropy").type == pa.float32()


def foreign(path, rows: list[tuple[int, int, list[int], list[float]]]) -> None:
    columns = list(zip(*rows, strict=True))
    names = ["document", "offset", "ids", "logprobs"]
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), path)


def test_rows_of_others(tmp_path, rng):
    corpus = RandomCorpus(rng, 6, VOCAB)
    corpus.document_lengths = np.array([3, 4, 0, 2, 5, 1])
    corpus._tokens = [np.arange(n) for n in corpus.document_lengths]
    a = [(0, 1, [5, 6], [-2.0, -0.5]), (1, 0, [7], [-0.25]), (1, 2, [8, 9, 1], [-1.0, -2.0, -1.5])]
    foreign(tmp_path / "a.parquet", a)  # unsorted entries, int64 ids, float64 values, gaps
    foreign(tmp_path / "b.parquet", [(4, 1, [2], [-0.125])])
    files = [tmp_path / "b.parquet", tmp_path / "a.parquet"]
    store = from_parquet(files, tmp_path / "s", vocab_size=VOCAB, corpus=corpus, codec="exact")
    store.check_corpus(corpus, full=True)
    assert store.num_entries == 7 and store.read(0).counts.tolist() == [0, 2, 0]
    expected = TeacherRows(
        np.array([[7, -1, -1], [-1, -1, -1], [8, 1, 9], [-1, -1, -1]], np.int32),
        np.array([[-0.25, 0, 0], [0, 0, 0], [-1, -1.5, -2], [0, 0, 0]], np.float32),
        np.array([1, 0, 3, 0], np.int32),
    )
    assert_rows_equal(store.read(1), expected)
    assert store.read(4).counts.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_some_rows_of_short_documents(tmp_path, rng, monkeypatch, share):
    """All others are empty, at once or after stops at any moment."""
    for name, rows in (("_BATCH_ROWS", 16), ("_FLUSH_ROWS", 30)):
        monkeypatch.setattr(parquet, name, rows)
    corpus = RandomCorpus(rng, 200, VOCAB, mean=3)
    lengths = corpus.document_lengths
    documents = np.repeat(np.arange(200), lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    last = offsets == lengths[documents] - 1
    there = np.flatnonzero((rng.random(len(last)) < share) & ~last)
    cut = int(documents[there[len(there) // 2]])  # the second file begins there
    expected = {}
    for name, part in (
        ("a", there[documents[there] < cut]),
        ("b", there[documents[there] >= cut]),
    ):
        rows = []
        for row in part:
            entries = rng.integers(1, 5)
            logprobs = np.sort(np.log(rng.dirichlet(np.ones(entries)))).astype(np.float32)[::-1]
            ids = rng.permutation(VOCAB)[:entries]
            expected[documents[row], offsets[row]] = ids.tolist(), logprobs.tolist()
            rows.append((documents[row], offsets[row], ids.tolist(), logprobs.tolist()))
        foreign(tmp_path / f"{name}.parquet", rows)

    def convert() -> LogitStore:
        settings = {"vocab_size": VOCAB, "corpus": corpus, "codec": "exact"}
        return from_parquet([tmp_path], tmp_path / "s", **settings)

    append = LogitStoreWriter.append_run

    def stopped_now_and_then(self, *arguments) -> int:
        if rng.random() < 0.1:
            raise KeyboardInterrupt
        return append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LogitStoreWriter, "append_run", stopped_now_and_then)
        for _ in range(4):
            with contextlib.suppress(KeyboardInterrupt):
                convert()
    store = convert()
    store.check_corpus(corpus, full=True)
    assert store.num_entries == sum(len(ids) for ids, _ in expected.values())
    for document, length in enumerate(lengths.tolist()):
        found = store.read(document)
        assert len(found) == length
        for offset, count in enumerate(found.counts):
            ids, logprobs = expected.get((document, offset), ([], []))
            assert found.ids[offset, :count].tolist() == ids
            assert found.logprobs[offset, :count].tolist() == logprobs


def test_rows_of_other_documents_than_a_file_says(tmp_path, store):
    (path,) = to_parquet(store, tmp_path / "p")
    table = pq.read_table(path)
    documents = table["document"].to_numpy().copy()
    documents[-1] = 25
    pq.write_table(table.set_column(0, "document", pa.array(documents)), path)
    with pytest.raises(StoreError, match="has rows of document 25, but says that it holds 0 to 24"):
        from_parquet([path], tmp_path / "b")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([(0, 1, [1], [-1.0]), (0, 0, [1], [-1.0])], "Sort the rows"),
        ([(0, 0, [1, 2], [-1.0])], "has 2 ids and 1 logprobs"),
        ([(0, 0, [VOCAB], [-1.0])], "not in the vocabulary"),
        ([(0, 2, [1], [-1.0])], "last row has 1 entries"),
        ([(9, 0, [1], [-1.0])], "the corpus only 1"),
        ([(0, 3, [1], [-1.0])], "document 0, offset 3, but that document has 3 tokens"),
        ([(0, 1, [1], [-1.0]), (0, 1, [1], [-1.0])], "comes after document 0, offset 1"),
    ],
)
def test_bad_rows_are_refused(tmp_path, rng, rows, sentence):
    corpus = RandomCorpus(rng, 1, VOCAB)
    corpus.document_lengths = np.array([3])
    corpus._tokens = [np.arange(3)]
    foreign(tmp_path / "a.parquet", rows)
    with pytest.raises(StoreError, match=sentence):
        from_parquet([tmp_path], tmp_path / "s", vocab_size=VOCAB, corpus=corpus)
    with pytest.raises(StoreError, match="give --corpus"):
        from_parquet([tmp_path], tmp_path / "s", vocab_size=VOCAB)


def test_commands(tmp_path, store, monkeypatch, capsys):
    def command(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["megatron-pd", "convert", *map(str, words)])
        return main()

    assert command("to-parquet", store.path, "--output", tmp_path / "p") == 0
    words = ("--output", tmp_path / "b", "--codec", "exact")
    assert command("from-parquet", tmp_path / "p", *words) == 0
    assert_same(LogitStore(tmp_path / "b"), store)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    capsys.readouterr()
    for words in ("from-parquet", tmp_path / "bad.parquet"), ("to-parquet", tmp_path / "none"):
        with pytest.raises(SystemExit) as left:
            command(*words, "--output", tmp_path / "out")
        assert left.value.code == 1 and capsys.readouterr().err.startswith("error: ")
    real_import = builtins.__import__

    def without_pyarrow(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(SystemExit) as left:
        command("to-parquet", store.path, "--output", tmp_path / "q")
    assert left.value.code == 1 and "megatron-pd[parquet]" in capsys.readouterr().err

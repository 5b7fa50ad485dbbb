"""A codec from outside the package: written, read, merged, verified and recoded like the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from random_rows import RandomCorpus, assert_rows_equal, random_rows

from megatron_pd.cli import main
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.verify import verify_store
from megatron_pd.store.codecs import CODECS, Codec, ExactCodec, Trainer
from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import Layout

VOCAB = 211
HERE = f"{__name__}:ZlibCodec"


class FirstIds:
    """Trains a dictionary: the first rows, as `exact` has them."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.made = layout, False

    def train(self, runs: list[RaggedRows]) -> bytes | None:
        if self.made:
            return None
        self.made = True
        return ExactCodec(self.layout, None).encode(runs[0])[-32768:] or b"none"

    def found_model(self, model: bytes) -> None:
        self.made = True

    def found_rows(self, entries: int) -> None:
        pass


class ZlibCodec(Codec):
    """zlib over what `exact` writes, with a dictionary."""

    name, version = "zlib-exact", 3

    def __init__(self, layout: Layout, model: bytes | None) -> None:
        super().__init__(layout, model)
        assert model is not None
        self.exact, self.dictionary = ExactCodec(layout, None), model

    def encode(self, rows: RaggedRows) -> bytes:
        compressor = zlib.compressobj(zdict=self.dictionary)
        return compressor.compress(self.exact.encode(rows)) + compressor.flush()

    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        data = zlib.decompressobj(zdict=self.dictionary).decompress(stream)
        return self.exact.decode(data, rows, entries)

    @classmethod
    def trainer(cls, layout: Layout) -> Trainer:
        return FirstIds(layout)


class LyingCodec(Codec):
    """Bytes of `exact`, and rows that no store may hold."""

    name, version = "lying", 1
    lie = staticmethod(lambda rows: rows)

    def encode(self, rows: RaggedRows) -> bytes:
        return ExactCodec(self.layout, None).encode(rows)

    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        return self.lie(ExactCodec(self.layout, None).decode(stream, rows, entries))


def write(path: Path, corpus: RandomCorpus, rows, documents: list[range], codec, **options) -> None:
    for shard in documents:
        with LogitStoreWriter(
            path,
            vocab_size=VOCAB,
            document_lengths=corpus.document_lengths,
            metadata={"teacher": "random"},
            codec=codec,
            corpus=corpus,
            documents=shard,
            statistics=["label_logprob", "entropy"],
            **options,
        ) as writer:
            for document in shard:
                writer.append(document, 0, rows[document])


@pytest.fixture
def corpus(rng) -> RandomCorpus:
    return RandomCorpus(rng, 40, VOCAB)


@pytest.fixture
def rows(rng, corpus) -> list[TeacherRows]:
    return [random_rows(rng, int(n), VOCAB, 8, statistics=True) for n in corpus.document_lengths]


def assert_holds(path: Path, rows: list[TeacherRows]) -> None:
    store = LogitStore(path)
    for document, expected in enumerate(rows):
        found = store.read(document)
        assert_rows_equal(found, expected)
        for name, values in expected.statistics.items():
            np.testing.assert_array_equal(found.statistics[name], values)
    assert verify_store(path) == []


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["megatron-pd", *map(str, words)])
    return main()


def flip_a_bit(path: Path, rng) -> None:
    """In the payload of the first block of the only shard."""
    shard = next(path.glob("*.shard"))
    data = bytearray(shard.read_bytes())
    block = data.index(b"PDBK\x02")
    size = int.from_bytes(data[block + 12 : block + 16], "little")
    data[block + 48 + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    shard.write_bytes(data)


@pytest.mark.parametrize("codec", [ZlibCodec, HERE])
def test_rows_come_back_as_they_were(tmp_path, corpus, rows, codec):
    write(tmp_path, corpus, rows, [range(0, 15), range(15, 40)], codec)
    assert_holds(tmp_path, rows)
    store = LogitStore(tmp_path)
    assert store.codecs == {"zlib-exact"}
    store.check_corpus(corpus, full=True)
    assert store.manifest.codecs == [
        {"name": "zlib-exact", "version": 3, "number": 2, "import": HERE}
    ]


def test_several_threads_gather(tmp_path, rng, corpus, rows):
    write(tmp_path, corpus, rows, [range(0, 40)], ZlibCodec)
    store = LogitStore(tmp_path)
    whole = TeacherRows.concatenate(rows)
    spans = np.array([(d, 0, n) for d, n in enumerate(corpus.document_lengths)])

    def gather(width: int) -> None:
        total = len(whole)
        out = np.zeros((total, width), np.int32), np.zeros((total, width), np.float32)
        counts, entropy = np.zeros(total, np.int32), np.zeros(total, np.float32)
        store.gather(spans, *out, counts, {"entropy": entropy})
        kept = TeacherRows(
            whole.ids[:, :width], whole.logprobs[:, :width], np.minimum(whole.counts, width)
        )
        assert_rows_equal(TeacherRows(*out, counts), kept)
        np.testing.assert_array_equal(entropy, whole.statistics["entropy"])

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(gather, 1 + seed % 8) for seed in range(24)]:
            done.result()


def test_interrupted_writer_goes_on(tmp_path, corpus, rows):
    first = int(corpus.document_lengths.argmax())
    settings = {
        "vocab_size": VOCAB,
        "document_lengths": corpus.document_lengths,
        "metadata": {},
        "codec": ZlibCodec,
        "statistics": ["label_logprob", "entropy"],
    }
    writer = LogitStoreWriter(tmp_path, **settings)
    writer.append(first, 0, rows[first])
    writer.flush()
    writer.abandon()
    with LogitStoreWriter(tmp_path, **settings) as writer:
        assert writer.written(first) == len(rows[first])
        for document, expected in enumerate(rows):
            if document != first:
                writer.append(document, 0, expected)
    assert_holds(tmp_path, rows)
    data = next(tmp_path.glob("*.shard")).read_bytes()
    assert data.count(b"PDBK\x01") == 1  # the dictionary that was found is the one in use


def test_merged_split_and_as_parquet(tmp_path, corpus, rows, monkeypatch):
    """One store with three codecs; blocks are copied as they are, cut ones too."""
    for name, documents, codec in [
        ("a", range(0, 12), ZlibCodec),
        ("b", range(12, 27), "exact"),
        ("c", range(27, 40), LyingCodec),
    ]:
        write(tmp_path / name, corpus, rows, [documents], codec)
    parts = [tmp_path / name for name in "cab"]
    assert command(monkeypatch, "merge", *parts, "--output", tmp_path / "m") == 0
    assert_holds(tmp_path / "m", rows)
    merged = LogitStore(tmp_path / "m")
    assert merged.codecs == {"zlib-exact", "exact", "lying"}
    assert [entry["number"] for entry in merged.manifest.codecs] == [0, 2, 3]
    words = ("--at", 5, 30, "--workers", 2)
    assert command(monkeypatch, "split", tmp_path / "m", "--output", tmp_path / "s.pd", *words) == 0
    assert_holds(tmp_path / "s-0.pd", rows[:5])
    assert_holds(tmp_path / "s-1.pd", rows[5:30])
    assert_holds(tmp_path / "s-2.pd", rows[30:])
    to = ("convert", "to-parquet", tmp_path / "m", "--output", tmp_path / "p")
    back = ("convert", "from-parquet", tmp_path / "p", "--output", tmp_path / "q")
    assert command(monkeypatch, *to) == 0
    assert command(monkeypatch, *back, "--codec", HERE) == 0
    assert_holds(tmp_path / "q", rows)


def test_recoded_from_the_command_line(tmp_path, corpus, rows):
    """In processes of their own, where nothing has imported the codec."""
    write(tmp_path / "a", corpus, rows, [range(0, 40)], "exact")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), "."])}

    def run(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "megatron_pd.cli", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    to_own = ("recode", tmp_path / "a", "--output", tmp_path / "b", "--codec", HERE)
    back = ("recode", tmp_path / "b", "--output", tmp_path / "c", "--codec", "exact")
    for words in (to_own, ("verify", tmp_path / "b"), back):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    assert LogitStore(tmp_path / "b").codecs == {"zlib-exact"}
    assert_holds(tmp_path / "b", rows)
    assert_holds(tmp_path / "c", rows)
    assert json.loads(run("stats", tmp_path / "b", "--json").stdout)["entries"] == sum(
        int(part.counts.sum()) for part in rows
    )
    environment["PYTHONPATH"] = "."
    done = run("inspect", tmp_path / "b")
    assert done.returncode == 1 and "coded by 'zlib-exact', which isn't here" in done.stderr
    done = run("recode", tmp_path / "a", "--output", tmp_path / "d", "--codec", "nowhere:Codec")
    assert done.returncode == 2 and "can't be imported" in done.stderr


def test_flipped_bit_is_named(tmp_path, rng, corpus, rows):
    write(tmp_path, corpus, rows, [range(0, 40)], ZlibCodec)
    flip_a_bit(tmp_path, rng)
    (problem,) = verify_store(tmp_path)
    assert "the block at byte" in problem and "is damaged" in problem
    with pytest.raises(StoreError, match="is damaged"):
        for document in range(40):
            LogitStore(tmp_path).read(document)


def test_what_a_codec_raises_is_damage_of_the_block(tmp_path, monkeypatch, corpus, rows):
    write(tmp_path, corpus, rows, [range(0, 40)], ZlibCodec)
    document = int(corpus.document_lengths.argmax())

    def fail(self, stream, rows, entries):
        raise KeyError("no such symbol")

    monkeypatch.setattr(ZlibCodec, "decode", fail)
    with pytest.raises(
        StoreError, match=r"the block at byte .*: codec 'zlib-exact' can't decode it: KeyError"
    ) as raised:
        LogitStore(tmp_path).read(document)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (lambda r: r[: len(r) - 1], "its codec gives .* rows of .* its header says"),
        (lambda r: RaggedRows(r.counts, r.ids + VOCAB, r.logprobs), "is not in the vocabulary"),
        (lambda r: RaggedRows(r.counts[::-1].copy() - 1, r.ids, r.logprobs), "entries"),
        (lambda r: RaggedRows(r.counts, r.ids * 0, r.logprobs), "id 0 comes twice"),
        (lambda r: RaggedRows(r.counts, r.ids, -r.logprobs), "is not finite and at most 0"),
        (lambda r: None, "AttributeError"),
    ],
)
def test_rows_that_a_codec_makes_up_are_refused(
    tmp_path, monkeypatch, rng, corpus, rows, lie, sentence
):
    write(tmp_path, corpus, rows, [range(0, 40)], LyingCodec)
    monkeypatch.setattr(LyingCodec, "lie", staticmethod(lie))
    document = int(corpus.document_lengths.argmax())
    with pytest.raises(StoreError, match=f"the block at byte .*{sentence}"):
        LogitStore(tmp_path).read(document)
    assert "the block at byte" in verify_store(tmp_path)[0]


def with_manifest(path: Path, **changed) -> None:
    """The first codec of a manifest, with other fields."""
    body = json.loads((path / "store.json").read_bytes().rpartition(b"\n#crc32 ")[0])
    body["codecs"][0].update(changed)
    data = json.dumps(body).encode()
    (path / "store.json").write_bytes(data + b"\n#crc32 %08x\n" % zlib.crc32(data))


@pytest.mark.parametrize(
    ("codec", "changed", "sentence"),
    [
        ("exact", {"version": 2}, "'exact' of version 2, and this release of megatron_pd is"),
        ("exact", {"name": "zstd"}, "coded by 'zstd', and this release of megatron_pd has compact"),
        (ZlibCodec, {"version": 4}, "'zlib-exact' of version 4, and .*ZlibCodec is 'zlib-exact'"),
        (ZlibCodec, {"import": "nowhere:Codec"}, "which isn't here. .* can't be imported"),
        (ZlibCodec, {"import": "json:dumps"}, "which isn't here"),
    ],
)
def test_unknown_codecs_and_versions_are_a_sentence(
    tmp_path, corpus, rows, codec, changed, sentence
):
    write(tmp_path, corpus, rows, [range(0, 40)], codec)
    with_manifest(tmp_path, **changed)
    with pytest.raises(StoreError, match=f"store.json: .*{sentence}"):
        LogitStore(tmp_path)
    assert len(verify_store(tmp_path)) == 1


def test_codecs_that_no_reader_finds_again_are_refused(tmp_path, corpus, rows):
    class Local(ZlibCodec):
        name = "local"

    class Nameless(LyingCodec):
        name = "exact"

    for codec, sentence in [
        (Local, "could not find the codec"),
        (Nameless, "has the name 'exact'"),
    ]:
        with pytest.raises(StoreError, match=sentence):
            write(tmp_path / "a", corpus, rows, [range(0, 40)], codec)
    with pytest.raises(UserError, match="There is no codec 'zip'"):
        write(tmp_path / "a", corpus, rows, [range(0, 40)], "zip")
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a", corpus, rows, [range(0, 20)], "exact")
    with pytest.raises(
        StoreError,
        match=r"the store was begun with codecs=.exact version 1., now codecs=.zlib-exact",
    ):
        write(tmp_path / "a", corpus, rows, [range(20, 40)], ZlibCodec)


@pytest.mark.parametrize("name", [*CODECS, HERE])
def test_every_codec_keeps_its_promises(rng, name):
    """The protocol alone: what a codec decodes to, it slices bit-exact."""
    codec = CODECS.get(name)
    layout = Layout(VOCAB, 0, 10)
    rows = RaggedRows.of(random_rows(rng, 60, VOCAB, 8), VOCAB, 0, str)
    trainer = codec.trainer(layout)
    coder = codec(layout, None if trainer is None else trainer.train([rows]))
    stream = coder.encode(rows)
    found = coder.decode(stream, len(rows), len(rows.ids))
    np.testing.assert_array_equal(found.counts, rows.counts)
    first, stop = np.sort(rng.integers(0, 61, 2)).tolist()
    expected = found[first:stop]
    part = coder.slice(stream, len(rows), len(rows.ids), first, stop)
    again = coder.decode(part, stop - first, len(expected.ids))
    for field in ("counts", "ids", "logprobs"):
        np.testing.assert_array_equal(getattr(again, field), getattr(expected, field))

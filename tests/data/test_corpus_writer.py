import multiprocessing
import os
import random
import resource

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_pd.data import corpus_writer
from megatron_pd.data.corpus_writer import CorpusWriter
from megatron_pd.errors import UserError


def documents(dtype, count):
    return [
        np.random.randint(0, np.iinfo(dtype).max, random.randint(1, 50)).astype(dtype)
        for _ in range(count)
    ]


def write(prefix, found, dtype, *, at_once=7):
    with CorpusWriter(prefix, dtype) as writer:
        for start in range(0, len(found), at_once):
            piece = found[start : start + at_once]
            writer.append(np.concatenate(piece), np.array(list(map(len, piece)), np.int32))
            writer.append(np.zeros(0, dtype), np.zeros(0, np.int32))
        assert (writer.documents, writer.tokens) == (len(found), sum(map(len, found)))
        writer.publish()


def content(prefix):
    return [open(f"{prefix}.{suffix}", "rb").read() for suffix in ("bin", "idx")]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("count", [1, 64, 333])
def test_files_are_those_of_megatrons_builder(tmp_path, monkeypatch, dtype, count):
    monkeypatch.setattr(corpus_writer, "_PIECE", 32)
    found = documents(dtype, count)
    write(str(tmp_path / "ours"), found, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for tokens in found:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(dataset[i], tokens) for i, tokens in enumerate(found))
    assert sorted(os.listdir(tmp_path)) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_only_a_published_corpus_replaces_another(tmp_path):
    prefix = str(tmp_path / "corpus")
    old, new = documents(np.uint16, 20), documents(np.uint16, 30)
    write(prefix, old, np.uint16)
    before = content(prefix)
    with pytest.raises(KeyboardInterrupt), CorpusWriter(prefix, np.uint16) as writer:
        writer.append(new[0], np.array([len(new[0])], np.int32))
        raise KeyboardInterrupt
    assert content(prefix) == before
    # What a killed process left is longer than what comes.
    (tmp_path / "corpus.unfinished.bin").write_bytes(bytes(100_000))
    (tmp_path / "corpus.unfinished.idx").write_bytes(bytes(100_000))
    write(prefix, new, np.uint16)
    write(str(tmp_path / "other"), new, np.uint16)
    assert content(prefix) == content(tmp_path / "other")


def test_a_killed_publication_leaves_no_index_beside_other_tokens(tmp_path, monkeypatch):
    prefix = str(tmp_path / "corpus")
    old, new = documents(np.uint16, 20), documents(np.uint16, 30)
    write(prefix, old, np.uint16)
    before = content(prefix)
    replace = os.replace
    for survived in range(3):
        calls = []

        def killed_replace(source, target, survived=survived, calls=calls):
            calls.append(target)
            if len(calls) > survived:
                os._exit(9)
            replace(source, target)

        def attempt(fake=killed_replace):
            monkeypatch.setattr(os, "replace", fake)
            write(prefix, new, np.uint16)

        write(prefix, old, np.uint16)
        assert content(prefix) == before
        process = multiprocessing.get_context("fork").Process(target=attempt)
        process.start()
        process.join()
        assert process.exitcode == (9 if survived < 2 else 0)
        assert os.path.exists(f"{prefix}.idx") == (survived == 2)


def test_one_process_writes_a_corpus(tmp_path):
    prefix = str(tmp_path / "corpus")
    with (
        CorpusWriter(prefix, np.uint16),
        pytest.raises(UserError, match=r"corpus\.unfinished\.bin: another process is writing"),
    ):
        CorpusWriter(prefix, np.uint16)
    assert not os.listdir(tmp_path)
    CorpusWriter(prefix, np.uint16).__exit__()


def test_a_full_disk_names_the_file_and_leaves_the_earlier_corpus(tmp_path):
    prefix = str(tmp_path / "corpus")
    write(prefix, documents(np.uint16, 5), np.uint16)
    before = content(prefix)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = documents(np.uint16, 3000)
    short = [tokens[:1] for tokens in many]
    for found, suffix in ((many, "bin"), (short, "idx")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            with pytest.raises(OSError, match="an earlier one stays") as error:
                write(prefix, found, np.uint16)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.filename == f"{prefix}.unfinished.{suffix}"
        assert content(prefix) == before
        assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]

"""A corpus and its store, staged from a folder and from an S3 server that goes away.

The server is moto's, whose botocore wants an older dateutil than constraints.txt has, so that its
two tests run where it is brought along:

    pip install --target /some/folder 'moto[s3]' flask flask-cors boto3
    PYTHONPATH=/some/folder python -m pytest tests/data/test_staging.py
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.corpus_writer import CorpusWriter
from megatron_pd.data.staging import FolderSource, S3Source, stage
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Prefix of a corpus of 40 documents with its store, in two shards."""
    prefix = tmp_path / "shared" / "corpus"
    prefix.parent.mkdir()
    generator = np.random.default_rng()
    lengths = generator.integers(200, 400, 40, np.int32)
    with CorpusWriter(str(prefix), np.uint16) as writer:
        writer.append(generator.integers(0, 1000, lengths.sum()).astype(np.uint16), lengths)
        writer.publish()
    for documents in (range(20), range(20, 40)):
        with LogitStoreWriter(
            f"{prefix}.pd",
            vocab_size=1000,
            document_lengths=lengths.astype(np.int64),
            metadata={},
            documents=documents,
            corpus=MegatronCorpus(str(prefix)),
        ) as store:
            for document in documents:
                rows = int(lengths[document])
                ids = np.argsort(generator.random((rows, 1000)))[:, :20].astype(np.int32)
                logprobs = np.full((rows, 20), np.log(0.04), np.float32)
                counts = np.full(rows, 20, np.int32)
                counts[-1], ids[-1], logprobs[-1] = 0, -1, 0
                store.append(document, 0, TeacherRows(ids, logprobs, counts))
    return prefix


def files_of(prefix: Path) -> dict[str, bytes]:
    paths = [*prefix.parent.glob("corpus.*"), *Path(f"{prefix}.pd").iterdir()]
    return {
        str(path).removeprefix(str(prefix)): path.read_bytes() for path in paths if path.is_file()
    }


def test_a_folder_is_copied_once_and_goes_on(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "local" / "corpus"
    expected = files_of(source)
    total = sum(map(len, expected.values()))
    assert stage(FolderSource(str(source)), str(target), workers=2, patience=0) == total
    assert files_of(target) == expected
    assert stage(FolderSource(str(source)), str(target), workers=2, patience=0) == 0
    half = expected[".bin"][: len(expected[".bin"]) // 2]
    Path(f"{target}.bin").unlink()
    Path(f"{target}.bin.staging").write_bytes(half)
    copied = stage(FolderSource(str(source)), str(target), workers=2, patience=0)
    assert copied == len(expected[".bin"]) - len(half)
    assert files_of(target) == expected


def test_what_cannot_be_staged_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no \.bin and \.idx"):
        stage(FolderSource(str(source) + "x"), str(tmp_path / "a"), workers=1, patience=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"0 bytes free and .* are to come"):
        stage(FolderSource(str(source)), str(tmp_path / "b" / "corpus"), workers=1, patience=0)


# --- S3 -------------------------------------------------------------------------------------------


class Server:
    """moto's S3 on a local port, with the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        script = Path(__file__).with_name("s3_server.py")
        self._process = subprocess.Popen(
            [sys.executable, script, str(self.port), self._folder], stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError("moto's server doesn't listen")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")
    server = Server(source.parent)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server.start()
    server.wait()
    yield server
    server.kill()


def test_a_server_that_is_killed_in_the_middle_costs_only_time(
    server: Server, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_pd.data.staging._CHUNK", 1 << 14)
    target, expected = tmp_path / "nvme" / "corpus", files_of(source)
    total, seen = sum(map(len, expected.values())), 0
    back = threading.Timer(3, server.start)

    def kill_at_half(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > total // 2 and back.ident is None:
            server.kill()
            back.start()

    s3 = S3Source("s3://data/pile/corpus")
    assert stage(s3, str(target), workers=1, patience=60, report=kill_at_half) == total
    assert back.ident is not None
    back.join()
    assert files_of(target) == expected
    assert LogitStore(f"{target}.pd").num_documents == 40


def test_a_bucket_that_is_not_there_is_said_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://other/corpus: .*NoSuchBucket"):
        stage(S3Source("s3://other/corpus"), str(tmp_path / "corpus"), workers=1, patience=60)

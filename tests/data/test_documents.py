import gzip
import io
import json
import os
import random
import struct
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_pd.data import documents
from megatron_pd.data.documents import blocks, open_sources, read_documents
from megatron_pd.errors import UserError

BOM = b"\xef\xbb\xbf"


def random_text():
    letters = 'abc \n\t\r"\\{}[]äß日本🙂\u2028\u0085\x1c\ufeff\0\u2581'
    return "".join(random.choices(letters, k=random.randint(1, 200)))


@pytest.fixture
def texts():
    return [random_text() for _ in range(300)]


def json_lines(texts, key="text"):
    """Lines as dumps writes them, escaped and not, ended by either line end."""
    return b"".join(
        json.dumps({"id": 1, key: text}, ensure_ascii=random.random() < 0.5).encode()
        + random.choice([b"\n", b"\r\n"])
        for text in texts
    )


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def pzstd(data):
    """Frames after one another, behind a skippable one, as pzstd writes them."""
    cut = random.randint(0, len(data))
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"\x01\x02\x03\x04"
    return skippable + zstd(data[:cut]) + skippable + zstd(data[cut:])


def long_window(data):
    """As `zstd --long=31` does."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def two_members(data):
    cut = random.randint(0, len(data))
    return gzip.compress(data[:cut]) + gzip.compress(data[cut:])


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def read(*paths, **options):
    return [document.text for document in read_documents(paths, **options)]


def refusal(*paths, **options):
    with pytest.raises(UserError) as error:
        read(*paths, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl", bytes),
        ("a.NDJSON", bytes),
        ("a.Json", bytes),
        ("part-00000", bytes),
        ("a.txt", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.JSONL.GZ", two_members),
        ("part-00000.gz", gzip.compress),
        ("part-00000", gzip.compress),
        ("a.json.zst", zstd),
        ("a.jsonl.zstd", pzstd),
        ("a.jsonl.zst", long_window),
        ("a.jsonl", zstd),
        ("a", pzstd),
    ],
)
@pytest.mark.parametrize("block_bytes", [64, 512 << 10])
def test_json_lines_by_any_name(tmp_path, texts, monkeypatch, name, compress, block_bytes):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / name, compress(json_lines(texts)))
    assert read(path) == texts
    assert sum(size for _, size in blocks(open_sources([path]), "text")) == os.path.getsize(path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_parquet_by_any_name(tmp_path, texts, kind):
    values = pa.array([text.encode() for text in texts]).cast(kind)
    table = pa.table({"id": list(range(len(texts))), "body": values})
    for name, options in (
        ("a.parquet", {"row_group_size": 7}),
        ("a.PQ", {"compression": "zstd"}),
        ("part-00000", {"use_dictionary": False}),
    ):
        pq.write_table(table, tmp_path / name, **options)
        path = str(tmp_path / name)
        assert read(path, json_key="body") == texts
        sizes = [size for _, size in blocks(open_sources([path]), "body")]
        assert sum(sizes) == os.path.getsize(path)


def test_parquet_of_dictionaries_and_nulls(tmp_path):
    values = pa.array(["a", "b", None, "a", ""]).dictionary_encode()
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == ["a", "b", None, "a", ""]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)]
)
def test_plain_text_is_kept_to_the_byte(tmp_path, monkeypatch, suffix, compress):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10)
    texts = {
        "a.txt": "one\r\ntwo\rthree\n",
        "a.MD": "[![badge](x)](y)\n",
        "a.py": "{x for x in 'äöü'}\n",
        "README": "{% raw %}",
        "a.rs": "[1] a footnote\n",
        "empty.txt": "",
        "long": "日本語" * 100_000,
    }
    paths = [write(tmp_path / f"{name}{suffix}", compress(t.encode())) for name, t in texts.items()]
    assert read(*paths) == list(texts.values())
    assert sum(size for _, size in blocks(open_sources(paths), "text")) == sum(
        map(os.path.getsize, paths)
    )


def test_order_of_mixed_files(tmp_path):
    pq.write_table(pa.table({"text": ["c", "d"]}), tmp_path / "1.parquet")
    paths = [
        write(tmp_path / "0", b"a"),
        write(tmp_path / "0.txt", b"b"),
        str(tmp_path / "1.parquet"),
        write(tmp_path / "2", b'{"text": "e"}'),
        write(tmp_path / "3.txt", b"f"),
    ]
    assert read(*paths) == list("abcdef")


def test_the_user_says_what_it_is(tmp_path):
    data = b'{"text": "a"}\n{"text": "b"}\n'
    for name in ("a.jsonl", "a.txt", "a.csv", "a"):
        path = write(tmp_path / name, data)
        assert read(path, input_format="text") == [data.decode()]
        assert read(path, input_format="jsonl") == ["a", "b"]
    path = write(tmp_path / "nul.bin", b"a\0b")
    assert read(path, input_format="text") == ["a\0b"]
    assert "is not a whole Parquet file" in refusal(path, input_format="parquet")


def test_byte_order_marks(tmp_path):
    line = b'{"text": "\xef\xbb\xbfa"}\n'
    paths = [
        write(tmp_path / "a.jsonl", BOM + line + BOM + line),
        write(tmp_path / "b", BOM + line),
        write(tmp_path / "c.txt", BOM + b"a" + BOM),
        write(tmp_path / "d.jsonl", BOM),
    ]
    assert read(*paths) == ["\ufeffa", "\ufeffa", "\ufeffa", "a\ufeff"]


# --- dirt -----------------------------------------------------------------------------------------


def test_what_is_no_unicode_is_replaced_and_said(tmp_path):
    lines = [
        rb'{"text": "lone \ud800 and \udc80\ud83d."}',
        rb'{"text": "a pair \ud83d\ude00"}',
        b'{"text": "latin \xe4, cut \xe6\x97, surrogate \xed\xa0\x80"}',
        b'{"text": "fine", "other": "\xe4"}',
        '{"text": "\ufffd was there"}'.encode(),
    ]
    expected = [
        ("lone \ufffd and \ufffd\ufffd.", True),
        ("a pair 😀", False),
        ("latin \ufffd, cut \ufffd\ufffd, surrogate \ufffd\ufffd\ufffd", True),
        ("fine", False),
        ("\ufffd was there", False),
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found = list(read_documents([path]))
    assert [(document.text, document.replaced) for document in found] == expected
    assert [document.number for document in found] == [1, 2, 3, 4, 5]
    (block, _), *_ = blocks(open_sources([path]), "text")
    assert block.place(3) == f"{path}, line 3"

    values = [b"latin \xe4", None, b"fine"]
    table = pa.table({"text": pa.array(values, pa.binary()).cast(pa.string(), safe=False)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(read_documents([str(tmp_path / "a.parquet")]))
    assert [tuple(document) for document in found] == [
        (1, "latin \ufffd", True),
        (2, None, False),
        (3, "fine", False),
    ]

    path = write(tmp_path / "a.txt", b"a long line with one curly quote\x92 of Windows")
    assert [tuple(document) for document in read_documents([path])] == [
        (0, "a long line with one curly quote\ufffd of Windows", True)
    ]


def test_empty_lines_and_nulls(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'\n \t\r\n{"text": null}\n\n{"text": ""}\n\r\n{"text": "a"}'
    )
    assert [(d.number, d.text) for d in read_documents([path])] == [(3, None), (5, ""), (7, "a")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"found invalid JSON \(Expecting property name.*column 2\)"),
        (b'{"text": "cut', r"found invalid JSON \(Unterminated string.*column 10\)"),
        (b'{"text": "a\tb"}', r"found invalid JSON \(Invalid control character at, column 12\)"),
        (b'{"text": "a"} {"text": "b"}', r"found invalid JSON \(Extra data, column 15\)"),
        (b"\0\0\0\0", "found invalid JSON"),
        (b"\xff\xfe", "found invalid JSON"),
        (b"plain words", "found invalid JSON"),
        (b'[{"text": "a"}]', "found a list"),
        (b'"a"', "found a string"),
        (b"null", "found a null"),
        (b"3.5", r"found the value 3\.5"),
        (b'{"body": "x", "id": 1}', "found an object with 'body', 'id' in it"),
        (b"{}", "found an object with nothing in it"),
        (b'{"text": 5}', "found the value 5 under 'text'"),
        (b'{"text": ["a"]}', "found a list under 'text'"),
        (b'{"text": {"a": 1}}', "found an object under 'text'"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"[" * 200_000, "found JSON that is nested too deeply"),
    ],
)
def test_lines_without_a_text_are_named(tmp_path, line, message):
    good = b'{"text": "fine"}\n'
    path = write(tmp_path / "a.jsonl", good + b"\n" + good + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 4: .*{message}.*--json-key\.$"):
        read(path)


def test_json_that_is_not_lines_is_no_plain_document(tmp_path):
    record = {"text": "a", "other": ["b"]}
    for data in (
        json.dumps(record, indent=2),
        json.dumps([record]),
        json.dumps([record], indent=1),
        json.dumps(["a", "b"]),
        json.dumps({"body": "a"}) + "\n",
        "\n\n  " + json.dumps([[1]]),
    ):
        for prefix in (b"", BOM):
            message = refusal(write(tmp_path / "part-00000", prefix + data.encode()))
            assert "part-00000, line" in message
            assert "--input-format text" in message
            assert "--input-format" not in refusal(write(tmp_path / "a.json", data.encode()))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\x7fELF\x02\0\0", "is not UTF-8 text"),
        ("a.jsonl", "{}".encode("utf-16-be"), "is not UTF-8 text"),
        ("a.txt", "Привет".encode("koi8-r"), "is not UTF-8 text"),
        ("a.txt", "Привет".encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("a", "Привет".encode("utf-32"), "is UTF-16 or UTF-32 text"),
        ("a.jsonl.bz2", b"BZh91AY&SY", "is compressed with bzip2"),
        ("a.xz", b"\xfd7zXZ\0\0\4", "is compressed with xz"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18d@", "is compressed with lz4"),
        ("a.zip", b"PK\x03\x04\x14\0", "is a zip archive"),
        ("a.csv", b"id,text\n1,a\n", "is a table"),
        ("a.TSV", b"id\ttext\n", "is a table"),
        ("a.warc.gz", gzip.compress(b"WARC/1.0\r\n"), "is a web archive"),
        ("a.tar.gz", gzip.compress(b"name.jsonl".ljust(512, b"\0")), "is not UTF-8 text"),
        ("a.parquet", b"no parquet", "is no Parquet file"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1 cut short", "is not a whole Parquet file"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "is Parquet inside gzip: decompress it first"),
        ("a.jsonl.gz", b"", r"ends in \.gz but is empty"),
        ("a.jsonl.zst", b"{}", r"ends in \.zst but is not compressed"),
    ],
)
def test_files_that_are_not_read(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / name, data))
    assert str(error.value).startswith(str(tmp_path / name))


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, "/dev/null"):
        assert f"{path} does not exist or is not a file" in refusal(str(path))


@pytest.mark.parametrize("compress", [gzip.compress, zstd, pzstd])
def test_compressed_files_that_were_cut_or_changed(tmp_path, compress):
    noise = random.randbytes(200_000).hex()
    whole = compress(json_lines([noise, noise[::-1]]))
    options = zstandard.ZstdCompressor(write_checksum=True)
    if compress is zstd:
        whole = options.compress(json_lines([noise, noise[::-1]]))
    path = tmp_path / "a.jsonl.x"
    for length in (*random.sample(range(60, len(whole)), 40), len(whole) - 1):
        message = refusal(write(path, whole[:length]))
        assert message.startswith(f"{path} cannot be decompressed")
        assert f"of its {length:,} bytes were read): it is damaged or was cut short" in message
    if compress is not pzstd:  # which has no checksum here
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[random.randrange(60, len(whole))] ^= 1 << random.randrange(8)
            assert str(path) in refusal(write(path, bytes(damaged)))
    assert "cannot be decompressed" in refusal(write(path, whole + b"no frame"))


def test_parquet_that_was_cut_or_changed(tmp_path):
    buffer = io.BytesIO()
    texts = [random.randbytes(500).hex() for _ in range(200)]
    pq.write_table(pa.table({"text": texts}), buffer, use_dictionary=False)
    whole = buffer.getvalue()
    path = tmp_path / "a.parquet"
    assert "is not a whole Parquet file" in refusal(write(path, whole[: len(whole) // 2]))
    zeros = whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :]
    assert "is not a whole Parquet file" in refusal(write(path, zeros))


def test_parquet_without_the_column(tmp_path, monkeypatch):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    assert "has the columns 'body', 'id' and no 'text'" in refusal(path)
    assert "column 'id' holds int64, expected strings" in refusal(path, json_key="id")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "is Parquet, which needs pyarrow: pip install 'megatron-pd[parquet]'" in refusal(path)


def test_documents_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 5000)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    good, long = b'{"text": "a"}\n', b'{"text": "' + b"a" * 5200 + b'"}'
    path = write(tmp_path / "a.jsonl", good * 50 + long)
    assert f"{path}, line 51, is a document of more than" in refusal(path)
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"a" * 5001))
    assert f"{path} is a document of more than" in refusal(path)
    assert read(write(tmp_path / "b.txt", b"a" * 5000)) == ["a" * 5000]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b" * 5001]}), path)
    assert f"{path}, row 2, is a document of more than" in refusal(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """400 MB that are 0.04 MB, one line 50 MB of it."""
    line = b'{"text": "' + b"a" * 1000 + b'"}\n'
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for _ in range(350):
            stream.write(line * 1000)
        stream.write(line.replace(b"a", b"a" * 50_000))
    tracemalloc.start()
    for block, _ in blocks(open_sources([str(path)]), "text"):
        last = block
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list(last.documents())[-1].text) == 50_000_000
    assert peak < 200 << 20

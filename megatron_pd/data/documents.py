"""The documents of text corpora: JSON lines, Parquet and plain text, plain or compressed.

`open_sources` looks at every file before work begins. `blocks` cuts the files into pieces of about
BLOCK_BYTES without looking into them, so that the one process that reads costs next to nothing a
document; `Block.documents` then parses a piece, in whichever process it was sent to.

Bytes that are not UTF-8 and lone surrogates (valid in JSON, impossible in UTF-8) become U+FFFD, and
the document says so. What cannot be read at all is a UserError that names file and line.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import zstandard

from megatron_pd.errors import UserError

__all__ = ["FORMATS", "Block", "Document", "Source", "blocks", "open_sources", "read_documents"]

FORMATS = ("jsonl", "parquet", "text")
BLOCK_BYTES = 512 << 10
MAX_DOCUMENT_BYTES = 256 << 20
_HEAD_BYTES = 64 << 10

_JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_PARQUET_SUFFIXES = {".parquet", ".pq"}
_COMPRESSED_SUFFIXES = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_REFUSED_SUFFIXES = {
    ".csv": "a table",
    ".tsv": "a table",
    ".warc": "a web archive",
    ".wet": "a web archive",
}
_REFUSED_MAGIC = {
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
    b"\0\0\xfe\xff": "UTF-32 text",
}
_BOM = b"\xef\xbb\xbf"
_JSON_START = re.compile(rb'(\[\s*)?\{\s*"')
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        size: of the file, bytes.
        by_content: its content alone, neither its name nor the user, said what format it has.
    """

    path: str
    format: str
    compression: Literal["gzip", "zstd"] | None
    size: int
    by_content: bool = False


class Document(NamedTuple):
    """One document as it was found.

    Attributes:
        number: what `Block.place` names it by.
        text: valid Unicode; None where the file has a null.
        replaced: something in it was not, and is U+FFFD now.
    """

    number: int
    text: str | None
    replaced: bool


class Block(ABC):
    """A piece of the input: picklable, some lines, rows or whole files, which its str() names."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, in order. Raises UserError for one that cannot be read."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Where a document of this block lies, for messages."""


def open_sources(paths: Sequence[str], input_format: str | None = None) -> list[Source]:
    """What every file is, by its suffix in any case or else by its content.

    Args:
        input_format: one of FORMATS, for all files; their compression is found out anyway.
    Raises:
        UserError: a file that does not exist, is empty where it must not be, or is none of these.
    """
    return [_open_source(path, input_format) for path in paths]


def blocks(sources: Sequence[Source], json_key: str) -> Iterator[tuple[Block, int]]:
    """Yield the input in order, piece by piece, each with the bytes of files that were read for it.

    Args:
        json_key: the member of a JSON object, or column of a Parquet file, that is the text.
    Raises:
        UserError: a file that is damaged, cut short, or has too large a document.
    """
    for source in sources:
        if source.format == "parquet":
            _parquet_file(source, json_key)
    for format, group in itertools.groupby(sources, lambda source: source.format):
        if format == "text":
            yield from _file_blocks(group)
            continue
        pieces = _line_blocks if format == "jsonl" else _row_blocks
        for source in group:
            yield from pieces(source, json_key)


def read_documents(
    paths: Sequence[str], json_key: str = "text", input_format: str | None = None
) -> Iterator[Document]:
    """The documents of all files, in order, read and parsed in this process."""
    for block, _ in blocks(open_sources(paths, input_format), json_key):
        yield from block.documents()


# --- what a file is -------------------------------------------------------------------------------


def _open_source(path: str, input_format: str | None) -> Source:
    if not os.path.isfile(path):
        raise UserError(f"--input {path} does not exist or is not a file.")
    with open(path, "rb") as file:
        magic = file.read(4)
    compression = _compression(magic)
    stem = Path(path.lower())
    if stem.suffix in _COMPRESSED_SUFFIXES:
        if compression is None:
            found = "is empty" if not magic else "is not compressed"
            raise UserError(
                f"{path} ends in {stem.suffix} but {found}: fetch it again, or rename it."
            )
        stem = stem.with_suffix("")
    size = os.path.getsize(path)
    if input_format is not None:
        return Source(path, input_format, compression, size)
    with _open_stream(path, compression) as (stream, _):
        head = stream.read(_HEAD_BYTES)
    by_name = stem.suffix in _JSON_SUFFIXES
    format = _format(path, stem.suffix, head, compression)
    return Source(path, format, compression, size, by_content=format == "jsonl" and not by_name)


def _compression(magic: bytes) -> Literal["gzip", "zstd"] | None:
    if magic.startswith(b"\x1f\x8b"):
        return "gzip"
    skippable = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" or skippable else None


def _format(path: str, suffix: str, head: bytes, compression: str | None) -> str:
    if head.startswith(b"PAR1"):
        if compression:
            raise UserError(f"{path} is Parquet inside {compression}: decompress it first.")
        return "parquet"
    found = next((kind for magic, kind in _REFUSED_MAGIC.items() if head.startswith(magic)), None)
    if found is None and suffix in _PARQUET_SUFFIXES:
        found = "empty" if not head else "no Parquet file, whatever its name says"
    if found is None and not _is_text(_first_line(head) if suffix in _JSON_SUFFIXES else head):
        found = "not UTF-8 text (but binary, or in another encoding)"
    if found is None and suffix in _REFUSED_SUFFIXES:
        found = _REFUSED_SUFFIXES[suffix]
    if found is not None:
        raise UserError(
            f"{path} is {found}: convert it to JSON lines, Parquet or plain UTF-8 text (which may "
            "be compressed with gzip or zstd), or say what it is with --input-format "
            f"{{{','.join(FORMATS)}}}."
        )
    return "jsonl" if suffix in _JSON_SUFFIXES or _looks_like_json(head) else "text"


def _first_line(head: bytes) -> bytes:
    return head.removeprefix(_BOM).lstrip().partition(b"\n")[0]


def _is_text(head: bytes) -> bool:
    """No NUL, and at most a tenth of it not UTF-8."""
    if len(head) == _HEAD_BYTES:
        head = head[:-3].rpartition(b"\n")[0] or head  # not cut through a character
    invalid = len(_SURROGATES.findall(head.decode("utf-8", "surrogateescape")))
    return b"\0" not in head and invalid <= len(head) // 10


def _looks_like_json(head: bytes) -> bool:
    if _JSON_START.match(head.removeprefix(_BOM).lstrip()):
        return True
    try:
        value = json.loads(_first_line(head))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], (dict, list, str))
    )


# --- streams --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_stream(path: str, compression: str | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed content, and the file itself, whose position is how far it was read.

    What goes wrong while they are read names the file.
    """
    with open(path, "rb") as file:
        stream: Any = file
        if compression == "gzip":
            stream = gzip.GzipFile(fileobj=file)
        elif compression == "zstd":
            stream = io.BufferedReader(_ZstdStream(file), 1 << 20)
        try:
            yield stream, file
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{path} cannot be decompressed ({error}; {file.tell():,} of its "
                f"{os.path.getsize(path):,} bytes were read): it is damaged or was cut short. "
                "Fetch it again."
            ) from error
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror or str(error), path) from error
            raise


class _ZstdStream(io.RawIOBase):
    """All frames of a zstd file.

    zstandard's own reader takes a file that was cut short for a whole one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        # As `zstd --long=31` allows; the memory is taken only by frames that ask for it.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._file = file
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(4096)  # which can hold 128 MiB of text
            if not self._input:
                if self._frame is not None:
                    raise EOFError("its last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _too_large(place: str) -> UserError:
    return UserError(
        f"{place} is a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB: split it. If it is "
        "many documents, give them as JSON lines or Parquet."
    )


def _valid(text: str | None) -> tuple[str | None, bool]:
    """The text without surrogates, and whether it had some."""
    if text is None or text.isascii():
        return text, False
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\ufffd", text), True
    return text, False


# --- JSON lines -----------------------------------------------------------------------------------


def _line_blocks(source: Source, json_key: str) -> Iterator[tuple[Block, int]]:
    line = 1
    done = 0
    with _open_stream(source.path, source.compression) as (stream, file):
        while data := stream.read(BLOCK_BYTES):
            if not data.endswith(b"\n"):
                rest = stream.readline(MAX_DOCUMENT_BYTES)
                data += rest
                if len(rest) == MAX_DOCUMENT_BYTES and not rest.endswith(b"\n"):
                    raise _too_large(f"{source.path}, line {line + data.count(b'\n')},")
            position = file.tell()
            yield _Lines(source.path, line, data, json_key, source.by_content), position - done
            line += data.count(b"\n")
            done = position


@dataclass(frozen=True)
class _Lines(Block):
    path: str
    first: int
    data: bytes
    key: str
    by_content: bool

    def __str__(self) -> str:
        return f"{self.path}, lines {self.first} to {self.first + self.data.rstrip().count(b'\n')}"

    def place(self, number: int) -> str:
        return f"{self.path}, line {number}"

    def documents(self) -> Iterator[Document]:
        for number, line in enumerate(self.data.split(b"\n"), self.first):
            line = line.removeprefix(_BOM)
            if not line or line.isspace():
                continue
            try:
                text = _text_of(line.decode("utf-8", "surrogateescape"), self.key)
            except ValueError as error:
                hint = "; if it is one plain document, say --input-format text"
                raise UserError(
                    f"{self.place(number)}: expected a JSON object with the text under "
                    f"{self.key!r}, found {error}; fix the line, or name another key with "
                    f"--json-key{hint if self.by_content else ''}."
                ) from error
            yield Document(number, *_valid(text))


def _text_of(line: str, key: str) -> str | None:
    """The text of a JSON line. Raises ValueError: what was found instead."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}")
    if key not in value:
        keys = ", ".join(map(repr, itertools.islice(value, 8)))
        raise ValueError(f"an object with {keys or 'nothing'} in it")
    text = value[key]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{_kind(text)} under {key!r}")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "a null"}
    return names.get(type(value), f"the value {value!r:.40}")


# --- plain text -----------------------------------------------------------------------------------


def _file_blocks(sources: Iterable[Source]) -> Iterator[tuple[Block, int]]:
    paths: list[str] = []
    contents: list[bytes] = []
    read = held = 0
    for source in sources:
        with _open_stream(source.path, source.compression) as (stream, _):
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(content) > MAX_DOCUMENT_BYTES:
            raise _too_large(source.path)
        paths.append(source.path)
        contents.append(content)
        read += source.size
        held += len(content)
        if held >= BLOCK_BYTES:
            yield _Files(tuple(paths), tuple(contents)), read
            paths, contents, read, held = [], [], 0, 0
    if paths:
        yield _Files(tuple(paths), tuple(contents)), read


@dataclass(frozen=True)
class _Files(Block):
    paths: tuple[str, ...]
    contents: tuple[bytes, ...]

    def __str__(self) -> str:
        return " to ".join(dict.fromkeys((self.paths[0], self.paths[-1])))

    def place(self, number: int) -> str:
        return self.paths[number]

    def documents(self) -> Iterator[Document]:
        for number, content in enumerate(self.contents):
            text = content.removeprefix(_BOM).decode("utf-8", "surrogateescape")
            yield Document(number, *_valid(text))


# --- Parquet --------------------------------------------------------------------------------------


def _parquet_file(source: Source, column: str) -> Any:
    """pyarrow's ParquetFile, whose `column` is known to be text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{source.path} is Parquet, which needs pyarrow: pip install 'megatron-pd[parquet]'."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False)
        schema = file.schema_arrow
    except pa.ArrowException as error:
        raise _damaged(source, error) from error
    if column not in schema.names:
        raise UserError(
            f"{source.path} has the columns {', '.join(map(repr, schema.names))} and no {column!r}:"
            " name the one with the text by --json-key."
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(
        is_kind(kind)
        for is_kind in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        )
    ):
        raise UserError(
            f"{source.path}: column {column!r} holds {kind}, expected strings: name the one with "
            "the text by --json-key."
        )
    return file


def _damaged(source: Source, error: Exception) -> UserError:
    return UserError(
        f"{source.path} is not a whole Parquet file ({error}): it is damaged or was cut short. "
        "Fetch it again."
    )


def _row_blocks(source: Source, column: str) -> Iterator[tuple[Block, int]]:
    import pyarrow as pa

    row = 0
    with _parquet_file(source, column) as file:
        # Row by row where rows are large: a batch is in memory as a whole.
        rows = file.metadata.num_rows
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        text_bytes = sum(
            group.column(i).total_uncompressed_size
            for group in groups
            for i in range(group.num_columns)
            if group.column(i).path_in_schema == column
        )
        batch_rows = max(1, min(65536, BLOCK_BYTES * rows // max(1, text_bytes)))
        try:
            for batch in file.iter_batches(batch_rows, columns=[column], use_threads=False):
                values = batch.column(0)
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                texts = tuple(values.cast(pa.large_binary()).to_pylist())
                for number, text in enumerate(texts, row + 1):
                    if text is not None and len(text) > MAX_DOCUMENT_BYTES:
                        raise _too_large(f"{source.path}, row {number},")
                share = source.size * (row + len(texts)) // rows - source.size * row // rows
                yield _Rows(source.path, row + 1, texts), share
                row += len(texts)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(source, error) from error


@dataclass(frozen=True)
class _Rows(Block):
    path: str
    first: int
    texts: tuple[bytes | None, ...]

    def __str__(self) -> str:
        return f"{self.path}, rows {self.first} to {self.first + len(self.texts) - 1}"

    def place(self, number: int) -> str:
        return f"{self.path}, row {number}"

    def documents(self) -> Iterator[Document]:
        for number, content in enumerate(self.texts, self.first):
            text = None if content is None else content.decode("utf-8", "surrogateescape")
            yield Document(number, *_valid(text))

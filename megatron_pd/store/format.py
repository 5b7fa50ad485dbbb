"""Bytes of a logit store: `docs/store-format.md` in code.  Version 1, little-endian.

A store is a directory: `store.json` (the manifest) and shard files.  A shard file is

    header | frame, frame, ... | index | CRC-32 of every page of the index | footer

where a frame is a block of rows or the entropy model that later blocks are coded with.  While it is
written a shard ends after its last frame and is called `….partial`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_pd.store.types import Corpus, Layout, StoreError

__all__ = [
    "DIGEST_BYTES",
    "MANIFEST_NAME",
    "MAX_VOCAB_SIZE",
    "MODEL_FRAME",
    "PAGE_BYTES",
    "PARTIAL_SUFFIX",
    "ROWS_FRAME",
    "Footer",
    "FrameHeader",
    "Manifest",
    "ShardHeader",
    "corpus_digests",
    "is_intact",
    "lengths_digest",
    "page_crcs",
    "parse_shard_name",
    "shard_name",
    "token_digest",
]

VERSION = 1
MAX_VOCAB_SIZE = 1 << 24
MANIFEST_NAME = "store.json"
PARTIAL_SUFFIX = ".partial"
PAGE_BYTES = 4096
DIGEST_BYTES = 8
MODEL_FRAME, ROWS_FRAME = 1, 2

_SHARD_NAME = re.compile(r"^(\d{12})-(\d{12})\.shard$")


def shard_name(documents: range) -> str:
    """File name of the shard of a contiguous range of documents (last one exclusive)."""
    return f"{documents.start:012d}-{documents.stop:012d}.shard"


def parse_shard_name(name: str) -> range | None:
    """The documents that a file name promises; None if it is no shard's name."""
    match = _SHARD_NAME.match(name)
    return range(int(match[1]), int(match[2])) if match else None


def token_digest(tokens: np.ndarray) -> int:
    """64-bit BLAKE2b of a document's tokens as little-endian int32, whatever their dtype is; 0 of
    an empty document."""
    if not len(tokens):
        return 0
    data = np.ascontiguousarray(tokens, dtype="<i4")
    return int.from_bytes(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest(), "little")


def corpus_digests(corpus: Corpus, documents: range | np.ndarray) -> np.ndarray:
    """`token_digest` of each of these documents: uint64 [documents]."""
    digests = (token_digest(corpus.tokens(document)) for document in documents)
    return np.fromiter(digests, np.uint64, len(documents))


def lengths_digest(document_lengths: np.ndarray) -> str:
    """128-bit BLAKE2b of all document lengths as little-endian int64, in hex."""
    lengths = np.ascontiguousarray(document_lengths, "<i8")
    return hashlib.blake2b(lengths, digest_size=16).hexdigest()


def page_crcs(data: bytes) -> bytes:
    """CRC-32 of each page of the index, as little-endian uint32."""
    crcs = [
        zlib.crc32(data[start : start + PAGE_BYTES]) for start in range(0, len(data), PAGE_BYTES)
    ]
    return np.array(crcs, "<u4").tobytes()


@dataclass(frozen=True)
class Manifest:
    """What all shards of a store have in common."""

    vocab_size: int
    documents: int
    rows: int
    lengths_digest: str
    draws: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    codecs: Sequence[Mapping[str, Any]] | None = None
    """`manifest_entries` of the store's codecs; None in stores from before there was the field."""

    source: bytes | None = field(default=None, compare=False, repr=False)
    """The file that it was read from, whatever fields a later release has put there."""

    @classmethod
    def of(
        cls,
        vocab_size: int,
        document_lengths: np.ndarray,
        draws: int,
        metadata: Mapping[str, Any],
        codecs: Sequence[Mapping[str, Any]] | None = None,
    ) -> Manifest:
        digest = lengths_digest(document_lengths)
        rows = int(document_lengths.sum())
        return cls(vocab_size, len(document_lengths), rows, digest, draws, dict(metadata), codecs)

    def to_bytes(self) -> bytes:
        if self.source is not None:
            return self.source
        body = json.dumps(
            {
                **({} if self.codecs is None else {"codecs": self.codecs}),
                "format": "megatron-pd logit store",
                "version": VERSION,
                "kind": "sampled" if self.draws else "top",
                "draws": self.draws,
                "vocab_size": self.vocab_size,
                "documents": self.documents,
                "rows": self.rows,
                "lengths_digest": self.lengths_digest,
                "metadata": self.metadata,
            },
            indent=1,
            sort_keys=True,
        ).encode()
        return body + b"\n#crc32 %08x\n" % zlib.crc32(body)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Manifest:
        body, mark, crc = data.rpartition(b"\n#crc32 ")
        if not mark or crc != b"%08x\n" % zlib.crc32(body):
            raise StoreError(
                f"{path}: the manifest is damaged (its checksum does not fit its text). "
                "Restore it from a copy: every host that dumped the store wrote the same file."
            )
        fields = json.loads(body)
        _check_version(fields["version"], path)
        return cls(
            vocab_size=fields["vocab_size"],
            documents=fields["documents"],
            rows=fields["rows"],
            lengths_digest=fields["lengths_digest"],
            draws=fields["draws"],
            metadata=fields["metadata"],
            codecs=fields.get("codecs"),
            source=data,
        )

    @property
    def store_id(self) -> int:
        """Ties a shard to its store: 64-bit BLAKE2b of the manifest's file."""
        digest = hashlib.blake2b(self.to_bytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class ShardHeader:
    """First 64 bytes of a shard."""

    store_id: int
    first_document: int
    documents: int
    rows: int
    vocab_size: int
    draws: int
    value_bits: int
    bound: bool

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sIIQQQQIIBBxx")
    MAGIC: ClassVar[bytes] = b"PDLOGITS"
    BYTES: ClassVar[int] = STRUCT.size + 4

    def to_bytes(self) -> bytes:
        body = self.STRUCT.pack(
            self.MAGIC,
            VERSION,
            self.BYTES,
            self.store_id,
            self.first_document,
            self.documents,
            self.rows,
            self.vocab_size,
            self.draws,
            self.value_bits,
            self.bound,
        )
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> ShardHeader:
        if data[:8] != cls.MAGIC:
            raise StoreError(f"{path}: not a logit-store shard (no {cls.MAGIC!r} at its start).")
        if len(data) >= 12:
            _check_version(int.from_bytes(data[8:12], "little"), path)
        if len(data) != cls.BYTES or not is_intact(data):
            raise StoreError(f"{path}: the shard's header is damaged. Dump this shard again.")
        _, _, _, store_id, first, documents, rows, vocab_size, draws, value_bits, bound = (
            cls.STRUCT.unpack(data[:-4])
        )
        return cls(store_id, first, documents, rows, vocab_size, draws, value_bits, bool(bound))

    @property
    def range(self) -> range:
        return range(self.first_document, self.first_document + self.documents)

    @property
    def layout(self) -> Layout:
        return Layout(self.vocab_size, self.draws, self.value_bits)


@dataclass(frozen=True)
class FrameHeader:
    """48 bytes before the payload of a block or an entropy model."""

    type: int
    codec: int
    statistics: int
    rows: int
    payload_bytes: int
    row: int
    model_offset: int
    entries: int
    max_count: int
    digests: int
    payload_crc: int

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<4sBBBxIIQQIHHI")
    MAGIC: ClassVar[bytes] = b"PDBK"
    BYTES: ClassVar[int] = STRUCT.size + 4

    def to_bytes(self) -> bytes:
        body = self.STRUCT.pack(
            self.MAGIC,
            self.type,
            self.codec,
            self.statistics,
            self.rows,
            self.payload_bytes,
            self.row,
            self.model_offset,
            self.entries,
            self.max_count,
            self.digests,
            self.payload_crc,
        )
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> FrameHeader | None:
        """None where no intact frame header starts."""
        if len(data) != cls.BYTES or data[:4] != cls.MAGIC or not is_intact(data):
            return None
        return cls(*cls.STRUCT.unpack(data[:-4])[1:])


@dataclass(frozen=True)
class Footer:
    """Last 64 bytes of a finished shard."""

    file_bytes: int
    index_offset: int
    index_bytes: int
    blocks: int
    entries: int
    max_count: int
    statistics: int
    header_crc: int

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sQQQQQIII")
    MAGIC: ClassVar[bytes] = b"PDLOGEND"
    BYTES: ClassVar[int] = STRUCT.size + 4

    def to_bytes(self) -> bytes:
        body = self.STRUCT.pack(
            self.MAGIC,
            self.file_bytes,
            self.index_offset,
            self.index_bytes,
            self.blocks,
            self.entries,
            self.max_count,
            self.statistics,
            self.header_crc,
        )
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Footer:
        if len(data) != cls.BYTES or data[:8] != cls.MAGIC or not is_intact(data):
            raise StoreError(
                f"{path}: the shard has no intact footer, so it was cut off or damaged. "
                "Copy it again from where it came from, or dump this shard again."
            )
        return cls(*cls.STRUCT.unpack(data[:-4])[1:])


def is_intact(data: bytes) -> bool:
    """Whether a header or footer ends with the CRC-32 of what is before."""
    return len(data) > 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")


def _check_version(version: int, path: Path) -> None:
    if version != VERSION:
        raise StoreError(
            f"{path}: format version {version}; this release of megatron_pd reads version "
            f"{VERSION}. Install the release that wrote the store, or dump it again."
        )

"""What a writer that was stopped has left: an unfinished shard is gone on with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from megatron_pd.store.files import AppendFile
from megatron_pd.store.format import FrameHeader, ShardHeader, is_intact
from megatron_pd.store.identity import check_header
from megatron_pd.store.types import StoreError

__all__ = ["recover"]


def recover(
    file: AppendFile, header: bytes, found: Callable[[FrameHeader, bytes, int], None]
) -> None:
    """Brings an unfinished shard to where appending goes on: its header is there and durable, and
    behind it lie whole frames only.

    Args:
        header: of the shard.
        found: is told header, payload and offset of every frame that is there.
    Raises:
        StoreError: the file belongs to another dump.
    """
    there = file.read(0, len(header))
    if file.end <= len(header) and there != header and not is_intact(there):
        # Nothing, or what a crash left of the header: no frame comes before it is durable.
        file.truncate(0)
        file.append(header)
        file.sync()
        return
    if there != header:
        if is_intact(there):
            begun = ShardHeader.from_bytes(there, file.path)
            check_header(file.path, begun, ShardHeader.from_bytes(header, file.path))
        raise StoreError(
            f"{file.path}: an unfinished shard without a sound header is in the way. Delete it, "
            "and its documents are dumped again."
        )
    end = len(header)
    for frame, payload, offset in _frames(file):
        found(frame, payload, offset)
        end = offset + FrameHeader.BYTES + len(payload)
    file.truncate(end)
    file.sync()  # a killed writer may have left what it wrote to the page cache alone


def _frames(file: AppendFile) -> Iterator[tuple[FrameHeader, bytes, int]]:
    """The whole frames at the start of an unfinished shard; ends at the first torn one."""
    offset = ShardHeader.BYTES
    while header := FrameHeader.from_bytes(file.read(offset, FrameHeader.BYTES)):
        payload = file.read(offset + FrameHeader.BYTES, header.payload_bytes)
        if len(payload) != header.payload_bytes or zlib.crc32(payload) != header.payload_crc:
            return
        yield header, payload, offset
        offset += FrameHeader.BYTES + header.payload_bytes

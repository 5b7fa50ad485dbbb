"""The append path of a shard: frames go to the end of its file, and the index remembers them."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megatron_pd.store.blocks import CodedBlock, EntropyModel
from megatron_pd.store.codecs import Codec
from megatron_pd.store.document_rows import DocumentRows
from megatron_pd.store.files import AppendFile
from megatron_pd.store.format import MODEL_FRAME, Footer, FrameHeader, ShardHeader, page_crcs
from megatron_pd.store.recovery import recover

__all__ = ["ShardAppender"]


class ShardAppender:
    """Opens the unfinished shard `file`, a new one or one to go on with.

    Args:
        header: of the shard.
        rows: is told the rows that are found and appended as blocks.
        codecs: by the number in a block's header.
        statistics: the mask of those that the shard has, rows or not.
        found: is told the header of every frame that was there, with the model that it holds.
    """

    def __init__(
        self,
        file: AppendFile,
        header: ShardHeader,
        rows: DocumentRows,
        codecs: Mapping[int, type[Codec]],
        statistics: int,
        found: Callable[[FrameHeader, EntropyModel | None], None],
    ) -> None:
        self._file, self._header, self._rows = file, header, rows
        self._codecs, self._found = codecs, found
        self._numbers = {codec: number for number, codec in codecs.items()}
        self._model_offsets: dict[bytes, int] = {}
        self._block_rows, self._block_offsets = array("Q"), array("Q")
        self._entries = self._max_count = 0
        self._statistics = statistics
        recover(file, header.to_bytes(), self._find)

    def add_model(self, model: EntropyModel) -> int:
        """Appends a model; returns where it lies."""
        header, payload = model.frame(self._numbers[model.codec])
        self._model_offsets[model.key] = offset = self._file.append(header.to_bytes() + payload)
        return offset

    def add_block(self, row: int, block: CodedBlock) -> None:
        """Appends a block whose first row is `row`, and its model unless it is there already."""
        model_offset = 0
        if block.model is not None:
            known = self._model_offsets.get(block.model.key)
            model_offset = self.add_model(block.model) if known is None else known
        begun = self._rows.begun_in(row, row + block.rows)
        digests = self._rows.digests[begun if self._header.bound else begun[:0]]
        header, payload = block.frame(self._numbers[block.codec], row, digests, model_offset)
        self._index(header, self._file.append(header.to_bytes() + payload))

    def sync(self) -> None:
        """Returns once everything appended is durable."""
        self._file.sync()

    def finish(self, path: Path) -> None:
        """Appends index and footer, and gives the shard its name."""
        blocks = np.stack(
            [np.array(self._block_rows, "<u8"), np.array(self._block_offsets, "<u8")], axis=1
        )
        parts = [self._rows.starts.astype("<u8").tobytes()]
        if self._header.bound:
            parts.append(self._rows.digests.astype("<u8").tobytes())
        index = b"".join([*parts, blocks[np.argsort(blocks[:, 0])].tobytes()])
        offset = self._file.append(index)
        self._file.append(page_crcs(index))
        footer = Footer(
            self._file.end + Footer.BYTES,
            offset,
            len(index),
            len(blocks),
            self._entries,
            self._max_count,
            self._statistics,
            zlib.crc32(self._header.to_bytes()),
        )
        self._file.append(footer.to_bytes())
        self._file.publish(path)

    def close(self) -> None:
        """Leaves the shard as it is."""
        self._file.close()

    def _index(self, header: FrameHeader, offset: int) -> None:
        self._block_rows.append(header.row)
        self._block_offsets.append(offset)
        self._entries += header.entries
        self._max_count = max(self._max_count, header.max_count)
        self._statistics |= header.statistics

    def _find(self, header: FrameHeader, payload: bytes, offset: int) -> None:
        if header.type == MODEL_FRAME:
            model = EntropyModel(self._codecs[header.codec], payload)
            self._model_offsets[model.key] = offset
            self._found(header, model)
            return
        self._index(header, offset)
        self._rows.add(header.row, header.row + header.rows)
        if self._header.bound:
            begun = self._rows.begun_in(header.row, header.row + header.rows)
            self._rows.digests[begun] = np.frombuffer(payload, "<u8", len(begun))
        self._found(header, None)

"""What a codec is: how the rows of a block become bytes, and rows again.

A codec is a subclass of `Codec`. The package's are registered in `megatron_pd.store.codecs`; one
from elsewhere is named `package.module:attribute`, and that name in the store's manifest is how
readers find it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol

from megatron_pd.store.ragged import RaggedRows
from megatron_pd.store.types import Layout

__all__ = ["Codec", "Trainer"]


class Trainer(Protocol):
    """Makes what a codec is trained to, its entropy model, from the rows of one shard.

    A model lies in the shard in a frame of its own; the blocks that were coded with it say where.
    """

    def train(self, runs: list[RaggedRows]) -> bytes | None:
        """Called with all rows that are about to be written: the model for them and for what
        follows, or None to go on with the last one."""

    def found_model(self, model: bytes) -> None:
        """Called for a model that was found in an unfinished shard; the last one stays in use."""

    def found_rows(self, entries: int) -> None:
        """Called for a block of so many entries that was found in an unfinished shard."""


class Codec(ABC):
    """Codes the blocks of a shard that share an entropy model. Threads use one at the same time.

    Attributes:
        name: in commands, the manifest and messages.
        version: changes with the bytes. A reader refuses another one than it knows.
        statistics_dtype: what the statistics of its blocks are stored as.
        normalises: no row that it decodes has a mass beyond 1, so none needs to be checked.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    statistics_dtype: ClassVar[Literal["<f4", "<f2"]] = "<f4"
    normalises: ClassVar[bool] = False

    def __init__(self, layout: Layout, model: bytes | None) -> None:
        """
        Args:
            model: the entropy model; None without a trainer, or while none was made yet.
        """
        self.layout = layout

    @abstractmethod
    def encode(self, rows: RaggedRows) -> bytes:
        """The stream of a block's rows (sound ones; the statistics are not the codec's)."""

    @abstractmethod
    def decode(self, stream: bytes, rows: int, entries: int) -> RaggedRows:
        """The rows of a stream, which are so many and have so many entries in all.

        Whatever it raises is reported as damage of the block, and so are rows that no store may
        hold: entries come by falling log-probability, in sampled rows draws sum up.
        """

    def slice(self, stream: bytes, rows: int, entries: int, first: int, stop: int) -> bytes:
        """The stream of the rows [first, stop) of a stream, which must decode to the very same.

        A codec whose encoding of what it decoded is not exact has to override it.
        """
        return self.encode(self.decode(stream, rows, entries)[first:stop])

    @classmethod
    def trainer(cls, layout: Layout) -> Trainer | None:
        """Of one shard that is written; None for a codec without an entropy model."""
        return None

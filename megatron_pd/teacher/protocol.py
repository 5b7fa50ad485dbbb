"""What a dump needs of a teacher, whatever runs it.

A teacher may be one process or many: `replicas` copies of the model, each of one or several ranks
that run every batch together. One rank of each replica writes that replica's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from megatron_pd.data.windows import Batch
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.dump_config import DumpConfig

__all__ = ["Teacher"]


class Teacher(Protocol):
    """A model whose next-token distributions go into a logit store."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, without padding."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells this teacher from others, as plain JSON, for the store's manifest: a
        `fingerprint` of its weights' content, its tokenizer, its precision. The same on all
        ranks, and wherever its files lie."""

    @property
    def length_multiple(self) -> int:
        """What the length of a batch must divide by."""

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to, in [0, replicas)."""

    @property
    def replicas(self) -> int:
        """How many copies of the model run side by side."""

    @property
    def writes(self) -> bool:
        """Whether this rank gets its replica's rows and writes them."""

    def run(self, batch: Batch, config: DumpConfig) -> TeacherRows | None:
        """The rows of a batch's windows; all ranks of a replica call it together.

        Returns:
            the rows of all windows' tokens, one window after another (padding has none), cut or
            drawn as `config` says, with the statistic `label_logprob` and those that `config` asks
            for; None on ranks that don't write.
        """

    def share(self, values: np.ndarray | None) -> np.ndarray:
        """The writing rank's int64 array, on all ranks of the replica.

        Args:
            values: on the writing rank the array, on the others None or one of the same shape.
        """

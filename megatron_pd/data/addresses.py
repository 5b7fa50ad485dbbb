"""Megatron's GPT dataset whose samples say where in the corpora their tokens lie.

Axes: S sequence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_pd.data.dataset import document_spans

__all__ = ["ADDRESSES", "AddressedGPTDataset", "AddressedGPTDatasetConfig"]

ADDRESSES = "addresses"
"""Entry of a sample: int64 [S, 3], corpus, document and offset of every token; −1 for a token whose
distribution is of no use, since none follows it in its document, and for padding."""


@dataclass
class AddressedGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig and the corpora, whose place in this list is their number."""

    corpora: tuple[str, ...] = ()


class AddressedGPTDataset(GPTDataset):
    """GPTDataset whose training samples also have `ADDRESSES`."""

    config: AddressedGPTDatasetConfig

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        if self.index_split == Split.train:
            sample[ADDRESSES] = torch.from_numpy(self._addresses(0 if idx is None else idx))
        return sample

    def _addresses(self, idx: int) -> np.ndarray:
        sample = self.shuffle_index[idx]
        lengths: Any = self.dataset.sequence_lengths
        spans = document_spans(
            self.document_index,
            lengths,
            self.sample_index[sample],
            self.sample_index[sample + 1],
            self.config.sequence_length,
        )
        addresses = np.full((self.config.sequence_length, 3), -1, np.int64)
        corpus = self.config.corpora.index(self.dataset_path)
        position = 0
        for document, offset, length in spans.tolist():
            taught = min(length, int(lengths[document]) - 1 - offset)
            own = addresses[position : position + taught]
            own[:, :2] = corpus, document
            own[:, 2] = np.arange(offset, offset + taught)
            position += length
        return addresses


# As PDGPTDataset's name: all runs of a corpus share one cache of sample indices.
AddressedGPTDataset.__name__ = GPTDataset.__name__

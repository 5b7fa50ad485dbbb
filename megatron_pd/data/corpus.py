"""A Megatron corpus (`.bin/.idx`) as the logit store addresses it: document by document."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_pd.errors import UserError

__all__ = ["MegatronCorpus", "store_path_of", "training_prefixes"]


class MegatronCorpus:
    """The documents of `<prefix>.bin/.idx`.

    A document here is an element of Megatron's IndexedDataset (a "sequence" in its terms), which
    is what GPTDataset shuffles and cuts samples from.
    """

    def __init__(self, prefix: str) -> None:
        for path in (get_bin_path(prefix), get_idx_path(prefix)):
            if not Path(path).is_file():
                raise UserError(
                    f"{path} does not exist: --data-path takes the corpus prefix without .bin or "
                    ".idx; `megatron-pd preprocess` makes the two files from text."
                )
        self.prefix = prefix
        self._dataset = IndexedDataset(prefix, mmap=True)

    @functools.cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, end-of-document token included: int64 [documents]."""
        return self._dataset.sequence_lengths.astype(np.int64)

    def tokens(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of a document, or of `length` of them from `offset`: 1-D, the file's dtype."""
        return self._dataset.get(document, offset=offset, length=length)

    def __len__(self) -> int:
        return len(self._dataset)


def training_prefixes(args: Any) -> list[str]:
    """The corpus prefixes that the training split is drawn from."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is None and blend_per_split is not None:
        blend = blend_per_split[0]
    if blend is None:
        raise UserError("No corpus is named: give --data-path (or --train-data-path).")
    return list(blend[0])


def store_path_of(prefix: str) -> str:
    """Where the logit store of a corpus lies unless a flag says otherwise."""
    return f"{prefix}.pd"

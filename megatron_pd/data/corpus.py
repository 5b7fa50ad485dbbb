"""A Megatron corpus (`.bin/.idx`) as the logit store addresses it: document by document."""

import functools
import mmap
import os
from typing import Any

import numpy as np

from megatron_pd.data.index import CorpusIndex, bin_path, idx_path
from megatron_pd.errors import UserError, naming

__all__ = ["MegatronCorpus", "store_path_of", "training_prefixes"]


class MegatronCorpus:
    """The documents of `<prefix>.bin/.idx`, read without Megatron and torch.

    A document here is an element of Megatron's IndexedDataset (a "sequence" in its terms), which
    is what GPTDataset shuffles and cuts samples from.

    Raises:
        UserError: a file is missing, is none of a corpus, or was cut short.
        OSError: a file can't be read; `filename` is its path.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        _check_files(prefix)
        self._index = CorpusIndex.open(idx_path(prefix))
        with naming(bin_path(prefix)):
            size = os.path.getsize(bin_path(prefix))
            end = 0
            if len(self):
                last = int(self._index.lengths[-1]) * self._index.dtype.itemsize
                end = int(self._index.positions[-1]) + last
            if size < end:
                raise UserError(
                    f"{bin_path(prefix)}: {size:,} bytes, {idx_path(prefix)} says that there are "
                    f"{end:,}: it was cut short, or belongs to another index. Copy both again."
                )
            self._bytes = np.zeros(0, np.uint8)
            if size:
                with open(bin_path(prefix), "rb") as file:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(data, np.uint8)

    @functools.cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of every document, end-of-document token included: int64 [documents]."""
        return self._index.lengths.astype(np.int64)

    def tokens(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of a document, or of `length` of them from `offset`: 1-D, the file's dtype."""
        dtype = self._index.dtype
        if length is None:
            length = int(self._index.lengths[document]) - offset
        start = int(self._index.positions[document]) + offset * dtype.itemsize
        return self._bytes[start : start + length * dtype.itemsize].view(dtype)

    def gather(self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`tokens` of many spans, one after another: 1-D, the file's dtype.

        Args:
            documents, offsets, lengths: int64 [spans].
        """
        dtype = self._index.dtype
        ends = np.cumsum(lengths)
        if not len(ends) or not ends[-1]:
            return np.zeros(0, dtype)
        starts = self._index.positions[documents] + (offsets - (ends - lengths)) * dtype.itemsize
        at = np.repeat(starts, lengths) + np.arange(ends[-1]) * dtype.itemsize
        # A token begins at any byte that the index names.
        everywhere = (len(self._bytes) - dtype.itemsize + 1,)
        return np.ndarray(everywhere, dtype, self._bytes, strides=(1,))[at]

    def __len__(self) -> int:
        return len(self._index.lengths)


def _check_files(prefix: str) -> None:
    for path in (bin_path(prefix), idx_path(prefix)):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; it must be the file of a corpus.")
        if os.path.exists(path):
            continue
        if path == idx_path(prefix):  # which `preprocess` names last
            raise UserError(
                f"{bin_path(prefix)} has no {path}: `megatron-pd preprocess` was killed as it "
                "gave them their names, or the copy is not complete. Run or copy it again."
            )
        raise UserError(
            f"{path} does not exist: --data-path takes the corpus prefix without .bin or .idx; "
            "`megatron-pd preprocess` makes the two files from text."
        )


def training_prefixes(args: Any) -> list[str]:
    """The corpus prefixes that the training split is drawn from."""
    # The rest here needs no Megatron, which has to be imported on a prepared device besides.
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend is None and blend_per_split is not None:
        blend = blend_per_split[0]
    if blend is None:
        raise UserError("No corpus is named: give --data-path (or --train-data-path).")
    return list(blend[0])


def store_path_of(prefix: str) -> str:
    """Where the logit store of a corpus lies unless a flag says otherwise."""
    return f"{prefix}.pd"

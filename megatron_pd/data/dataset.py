"""Megatron's GPT dataset with the teacher's rows of the same tokens.

Axes: S sequence, K columns of a teacher row.

A sample is S + 1 consecutive tokens, cut by Megatron from one or more documents. The sample's
teacher rows are those of its first S tokens, so row s is the teacher's distribution of the token
at s + 1, which is label s. Where a span ends with its document, that last row is empty: the next
document's first token has no teacher.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore

__all__ = [
    "ROWS_SECONDS",
    "PDGPTDataset",
    "PDGPTDatasetConfig",
    "dataset_fields",
    "document_spans",
]

ROWS_SECONDS = "rows_seconds"
"""Entry of a sample: how long reading its teacher rows took, in seconds."""


@dataclass
class PDGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig and where the teacher's rows are."""

    stores: dict[str, str] = field(default_factory=dict)
    """Corpus prefix → path of its logit store. Only the training split is read from it."""

    teacher_columns: int = 0
    """K: columns of every row; of longer rows the top K entries. 0: read no rows (a rank that
    computes no loss)."""

    teacher_statistic: str | None = None
    """A statistic of the stores, "entropy" or "std", to go with the rows."""

    teacher_timed: bool = False
    """Whether a sample also says how long its rows took."""


class PDGPTDataset(GPTDataset):
    """GPTDataset whose training samples also carry the teacher's rows.

    Adds to each sample what `TeacherTargets.to_sample` gives, rows [S, K], and with `teacher_timed`
    also ROWS_SECONDS, a float.
    """

    config: PDGPTDatasetConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._store: LogitStore | None = None
        if self.config.teacher_columns and self.index_split == Split.train:
            self._store = LogitStore(self.config.stores[self.dataset_path])

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        if self._store is not None:
            sample.update(self._teacher_rows(self._store, 0 if idx is None else idx))
        return sample

    def _teacher_rows(self, store: LogitStore, idx: int) -> dict[str, Any]:
        begin = time.perf_counter()
        length, name = self.config.sequence_length, self.config.teacher_statistic
        names = [] if name is None else [name]
        targets = TeacherTargets.empty((length,), self.config.teacher_columns, names)
        arrays = {key: tensor.numpy() for key, tensor in targets.tensors().items()}
        sample = self.shuffle_index[idx]
        spans = document_spans(
            self.document_index,
            self.dataset.sequence_lengths,
            self.sample_index[sample],
            self.sample_index[sample + 1],
            length,
        )
        rows = int(spans[:, 2].sum())
        store.gather(
            spans,
            arrays["ids"][:rows],
            arrays["logprobs"][:rows],
            arrays["counts"][:rows],
            {name: arrays[name][:rows] for name in names},
        )
        for name in names:
            self._fill_untaught(arrays[name], arrays["counts"], name, idx)
        sample_rows: dict[str, Any] = targets.to_sample()
        if self.config.teacher_timed:
            sample_rows[ROWS_SECONDS] = time.perf_counter() - begin
        return sample_rows

    def _fill_untaught(
        self, values: np.ndarray, counts: np.ndarray, name: str, sample: int
    ) -> None:
        """Rows without a teacher have no statistic; any number will do there, NaN would spread."""
        if not np.isfinite(values[counts > 0]).all():
            raise UserError(
                f"{self.config.stores[self.dataset_path]}: a row of training sample {sample} has "
                f"no {name!r}, which --pd-adaptive-temperature reads. Dump the teacher again with "
                "--dump-statistics, or choose wttm or a fixed --pd-temperature."
            )
        values[counts == 0] = 1.0


# Megatron names its caches of sample indices after the class, and the indices are the same: one
# cache serves a run with and without distillation.
PDGPTDataset.__name__ = GPTDataset.__name__


def dataset_fields(args: Any) -> dict[str, Any]:
    """GPTDatasetConfig's fields from Megatron's arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        sequences_per_dataset = json.loads(Path(args.per_dataset_sequences_path).read_bytes())
    return {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": build_tokenizer(args),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
    }


def document_spans(
    document_index: np.ndarray,
    document_lengths: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    sequence_length: int,
) -> np.ndarray:
    """The document spans under a sample's first `sequence_length` tokens.

    Args:
        document_index: documents in the order that the dataset visits them, int [visits].
        document_lengths: tokens of every document, int [documents].
        begin, end: (visit, offset) of this sample's and of the next sample's first token, as in
            GPTDataset.sample_index.
    Returns:
        int64 [spans, 3]: (document, offset, length) in the sample's order. Their lengths add up to
        `sequence_length`, or to less where the sample is padded.
    """
    spans = []
    left = sequence_length
    offset = int(begin[1])
    for visit in range(int(begin[0]), int(end[0]) + 1):
        document = int(document_index[visit])
        length = min(int(document_lengths[document]) - offset, left)
        if length > 0:
            spans.append((document, offset, length))
            left -= length
        offset = 0
    return np.array(spans, dtype=np.int64).reshape(-1, 3)

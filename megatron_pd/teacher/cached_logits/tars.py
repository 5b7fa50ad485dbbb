"""Megatron's cached logits: the tar shards of `--logits-save-dir`, read sample by sample.

Axes: S a sample's tokens, B a micro-batch, K columns of a row.

A tar `cp{C}_dp{D}__{L}.tar` holds what one context- and data-parallel rank saved up to iteration L
since its tar before: a `_meta.json`, then a `{iteration}.pt.zst` per iteration with log-probs
[S / cp, B, K] for every micro-batch. Names, members and payloads are read by Megatron's own
functions (megatron.training.distillation.utils_logits, megatron-core 0.19.2).
"""

import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.training.distillation.utils_logits import (
    BATCHED_TAR_RE,
    CACHED_LOGITS_LOGPROB_SENTINEL,
    META_TAR_MEMBER,
    LogprobsTarEntry,
    batched_tar_filename,
    decode_logprobs_payload,
    iter_logprobs_tar_entries,
    open_logit_file,
    storage_basename,
    storage_glob_with_caching,
)

from megatron_pd.errors import UserError
from megatron_pd.store import TeacherRows
from megatron_pd.store.ragged import MAX_MASS

__all__ = ["CachedLogits", "Flush", "sample_rows"]

_NOTHING = CACHED_LOGITS_LOGPROB_SENTINEL  # the log-prob that fills up a row


class Flush(NamedTuple):
    """Iterations [first, last] that every rank wrote into one tar each."""

    first: int
    last: int


@dataclass(frozen=True)
class CachedLogits:
    """The tars of a folder."""

    folder: str
    paths: dict[tuple[int, int, int], str]
    """(cp rank, dp rank, last iteration) → tar."""

    @classmethod
    def open(cls, folder: str) -> "CachedLogits":
        """Lists the folder; UserError where it holds no tar, or a rank has none."""
        paths = {}
        for path in storage_glob_with_caching(folder, "*.tar"):
            if match := BATCHED_TAR_RE.match(storage_basename(path)):
                paths[int(match["cp"]), int(match["dp"]), int(match["iter"])] = path
        if not paths:
            raise UserError(
                f"{folder}: no cp*_dp*__*.tar there. Give the folder that the teacher's run had as "
                "--logits-save-dir."
            )
        cached = cls(folder, paths)
        for cp, dp in itertools.product(range(cached.cp_size), range(cached.dp_size)):
            if not any((cp, dp) == key[:2] for key in paths):
                raise UserError(
                    f"{folder}: no tar of cp rank {cp}, dp rank {dp}, though there are tars of "
                    f"{cached.cp_size} cp ranks and {cached.dp_size} dp ranks. Copy all of them."
                )
        return cached

    @cached_property
    def cp_size(self) -> int:
        return 1 + max(cp for cp, _, _ in self.paths)

    @cached_property
    def dp_size(self) -> int:
        return 1 + max(dp for _, dp, _ in self.paths)

    @cached_property
    def flushes(self) -> list[Flush]:
        """A run that went back to an older checkpoint wrote some iterations twice: what it wrote
        again is the same, and is read once."""
        lasts = sorted({last for _, _, last in self.paths})
        return [Flush(a + 1, b) for a, b in itertools.pairwise([-1, *lasts])]

    @property
    def iterations(self) -> int:
        return self.flushes[-1].last + 1

    def metadata(self) -> dict[str, Any]:
        """The identity of the teacher's run as the first tar tells it."""
        path = next(iter(self.paths.values()))
        with open_logit_file(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                data = tar.extractfile(member)
                if member.name == META_TAR_MEMBER and data is not None:
                    return json.loads(data.read())
        raise UserError(f"{path}: no {META_TAR_MEMBER} in it, so it is not one of Megatron's tars.")

    def micro_batches(
        self, flush: Flush, dp_rank: int, first: int, expected_hash: str
    ) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
        """(iteration, its micro-batches) of a rank from iteration `first` on; a micro-batch is ids
        int64 [S, B, K] and log-probs float32 [S, B, K], the context-parallel parts put together.

        Iterations that some context-parallel rank lacks are left out.
        """
        paths = [self.paths.get((cp, dp_rank, flush.last)) for cp in range(self.cp_size)]
        first = max(first, flush.first)
        streams = [
            iter_logprobs_tar_entries(path, start_iteration=first, expected_hash=expected_hash)
            for path in paths
            if path is not None
        ]
        if len(streams) < len(paths):
            return
        try:
            for entries in _aligned(streams):
                decoded = [decode_logprobs_payload(entry.data) for entry in entries]
                micro_batches = [
                    (
                        _whole_sequence([ids[m] for _, ids in decoded], 0),
                        _whole_sequence([values[m].float() for values, _ in decoded], _NOTHING),
                    )
                    for m in range(len(decoded[0][0]))
                ]
                yield entries[0].iteration, micro_batches
        except (RuntimeError, OSError, EOFError, tarfile.TarError, ValueError) as error:
            name = batched_tar_filename(0, dp_rank, flush.last)
            raise UserError(
                f"{self.folder}: {name} or its like of another cp rank cannot be read: {error}. "
                "Copy it again from where the teacher ran."
            ) from error


def sample_rows(
    ids_SBK: np.ndarray, logprobs_SBK: np.ndarray, vocab_size: int
) -> list[TeacherRows]:
    """The rows of each sample of a micro-batch: what is no token of the vocabulary (Megatron's
    padding of it, or the sentinels that fill a row up) is left out."""
    found_SBK = np.isfinite(logprobs_SBK) & (logprobs_SBK != _NOTHING) & (ids_SBK < vocab_size)
    counts_SB = found_SBK.sum(-1)
    if (found_SBK != (np.arange(ids_SBK.shape[-1]) < counts_SB[..., None])).any():
        order = np.argsort(~found_SBK, axis=-1, kind="stable")
        ids_SBK, logprobs_SBK, found_SBK = (
            np.take_along_axis(array, order, -1) for array in (ids_SBK, logprobs_SBK, found_SBK)
        )
    ids_SBK = np.where(found_SBK, ids_SBK, -1).astype(np.int32)
    logprobs_SBK = np.where(found_SBK, np.minimum(logprobs_SBK, 0), 0).astype(np.float32)
    logprobs_SBK -= np.where(found_SBK, _rounded_up_SB(logprobs_SBK, found_SBK)[..., None], 0)
    return [
        TeacherRows(ids_SBK[:, b], logprobs_SBK[:, b], counts_SB[:, b].astype(np.int32))
        for b in range(ids_SBK.shape[1])
    ]


def _rounded_up_SB(logprobs_SBK: np.ndarray, found_SBK: np.ndarray) -> np.ndarray:
    """How far above 0 the log of a row's mass is, where float16 alone may have brought it beyond
    `MAX_MASS` (many alike entries that are the whole distribution); elsewhere 0."""
    probs_SBK = np.where(found_SBK, np.exp(logprobs_SBK.astype(np.float64)), 0)
    masses_SB = probs_SBK.sum(-1)
    rounding_SB = -(probs_SBK * logprobs_SBK).sum(-1) * 2.0**-11
    rounded_SB = (masses_SB > MAX_MASS) & (masses_SB <= 1 + rounding_SB)
    return np.where(rounded_SB, np.log(np.maximum(masses_SB, 1)), 0).astype(np.float32)


def _aligned(streams: list[Iterator[LogprobsTarEntry]]) -> Iterator[list[LogprobsTarEntry]]:
    """The entries of the iterations that all streams have; each stream's iterations rise."""
    entries = [next(stream, None) for stream in streams]
    while all(entry is not None for entry in entries):
        present = [entry for entry in entries if entry is not None]
        last = max(entry.iteration for entry in present)
        if all(entry.iteration == last for entry in present):
            yield present
            entries = [next(stream, None) for stream in streams]
        else:
            entries = [
                next(stream, None) if entry.iteration < last else entry
                for stream, entry in zip(streams, present, strict=True)
            ]


def _whole_sequence(parts: list[torch.Tensor], padding: float) -> np.ndarray:
    """[S / c, B, K] of each context-parallel rank → [S, B, K]: of 2c chunks rank r has r and
    2c - 1 - r (Megatron's zigzag)."""
    columns = max(part.shape[-1] for part in parts)
    arrays = [
        np.pad(
            part.numpy(), ((0, 0), (0, 0), (0, columns - part.shape[-1])), constant_values=padding
        )
        for part in parts
    ]
    if len(arrays) == 1:
        return arrays[0]
    halves = [np.split(array, 2) for array in arrays]
    return np.concatenate([half[0] for half in halves] + [half[1] for half in reversed(halves)])

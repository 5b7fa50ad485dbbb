"""Sparse teacher distributions and the truncations F(·) that turn a dense one into them.

Axes: T any leading shape (tokens), V the vocabulary, K the columns of a row.

A row holds the head of the teacher's next-token distribution as *full-vocabulary* log-probabilities
at temperature 1. They are never renormalised, so the kept mass a = Σ exp(logprobs), and with it
the tail 1 − a, stays part of the data, and every smaller p or k, temperature and tail policy can be
chosen at training time.

Truncation is top-p, then top-k (arXiv 2410.16215, §3.1): the nucleus is the smallest set whose
full-vocabulary mass reaches p, so the token that crosses p is kept; of it, the top k stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_pd.errors import UserError

__all__ = [
    "TeacherTargets",
    "check_truncation",
    "row_mask",
    "rows_of_draws",
    "sample",
    "top_p_k",
    "truncate",
]


_SAMPLE_PREFIX = "teacher_"


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's sparse rows for a batch of tokens; a row of count 0 has no teacher."""

    ids: Tensor
    """int32 [..., K], global vocabulary ids; −1 in padding."""

    logprobs: Tensor
    """float32 [..., K], full-vocabulary log-probabilities in nats at temperature 1, falling along
    the row; 0 in padding."""

    counts: Tensor
    """int32 [...], entries in each row; they are its first columns."""

    entropy: Tensor | None = None
    """float32 [...], entropy in nats of the teacher's full distribution, if capture stored it."""

    std: Tensor | None = None
    """float32 [...], standard deviation of the teacher's logits over the vocabulary, likewise."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.logprobs.shape or self.ids.shape[:-1] != self.counts.shape:
            raise ValueError(
                f"Teacher rows do not fit together: ids {tuple(self.ids.shape)}, logprobs "
                f"{tuple(self.logprobs.shape)}, counts {tuple(self.counts.shape)}; expected "
                "ids and logprobs [..., K] with counts [...]."
            )

    @property
    def mask(self) -> Tensor:
        """bool [..., K], true where a column holds an entry."""
        return row_mask(self.counts, self.ids.shape[-1])

    @classmethod
    def empty(
        cls,
        leading: tuple[int, ...],
        columns: int,
        statistics: Collection[str] = (),
        device: torch.device | int | str = "cpu",
    ) -> TeacherTargets:
        """Rows without an entry, [*leading, columns], with the given statistics, all NaN."""
        return cls(
            torch.full((*leading, columns), -1, dtype=torch.int32, device=device),
            torch.zeros((*leading, columns), device=device),
            torch.zeros(leading, dtype=torch.int32, device=device),
            **{name: torch.full(leading, torch.nan, device=device) for name in statistics},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, of those that are there."""
        named = ((option.name, getattr(self, option.name)) for option in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def to_sample(self) -> dict[str, Tensor]:
        """The rows as entries of a data loader's sample, in which `from_batch` finds them again."""
        return {_SAMPLE_PREFIX + name: tensor for name, tensor in self.tensors().items()}

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> TeacherTargets | None:
        """The rows [B, S, K] of a micro-batch; None where its samples carry none."""
        found = {
            option.name: batch[_SAMPLE_PREFIX + option.name]
            for option in fields(cls)
            if _SAMPLE_PREFIX + option.name in batch
        }
        return cls(**found) if found else None

    def map(self, transform: Callable[[Tensor], Tensor]) -> TeacherTargets:
        """The same rows with `transform`, which acts on leading axes only, on each tensor."""
        return TeacherTargets(
            **{name: transform(tensor) for name, tensor in self.tensors().items()}
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherTargets:
        """The same rows on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def row_mask(counts_T: Tensor, columns: int) -> Tensor:
    """bool [..., columns], true in the first `counts_T` of each row."""
    return torch.arange(columns, device=counts_T.device) < counts_T.unsqueeze(-1)


def check_truncation(
    top_p: float | None,
    top_k: int | None,
    p_flag: str = "--pd-top-p",
    k_flag: str = "--pd-top-k",
) -> None:
    """Raise UserError, naming the flag, unless 0 < top_p ≤ 1 and top_k ≥ 1 (None is no limit)."""
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(
            f"{p_flag} is {top_p}; it is a share of the teacher's probability mass and must lie in "
            f"(0, 1]. Leave it out (or give 1) to keep every entry that the other limits allow."
        )
    if top_k is not None and top_k < 1:
        raise UserError(
            f"{k_flag} is {top_k}; at least one entry a token must be kept, so give 1 or more, or "
            "leave it out for no limit."
        )


def top_p_k(logits: Tensor, top_p: float | None = None, top_k: int | None = None) -> TeacherTargets:
    """Truncate dense rows to their top-p nucleus, then to the top-k of it.

    Args:
        logits: floating [..., V], logits or log-probabilities (which are their own log-softmax);
            −inf marks ids that can never be kept, such as vocabulary padding.
        top_p: mass of the nucleus in (0, 1]; None or 1 keeps all.
        top_k: most entries of a row; None for no limit.

    Returns:
        Rows of K = min(top_k, V) columns.
    """
    check_truncation(top_p, top_k)
    logprobs_TV = torch.log_softmax(logits.float(), dim=-1)
    vocab_size = logprobs_TV.shape[-1]
    columns = vocab_size if top_k is None else min(top_k, vocab_size)
    logprobs_TK, ids_TK = logprobs_TV.topk(columns, dim=-1)
    possible_T = torch.isfinite(logprobs_TK).sum(-1)
    counts_T = torch.minimum(_nucleus_counts(logprobs_TK, top_p), possible_T)
    return _pad(ids_TK, logprobs_TK, counts_T)


def truncate(
    targets: TeacherTargets, top_p: float | None = None, top_k: int | None = None
) -> TeacherTargets:
    """Cut stored rows down to a smaller p or k (a larger one changes nothing).

    Because the rows carry full-vocabulary mass, this equals truncating the dense distribution.
    Entropy and std describe the full distribution and stay as they are.
    """
    check_truncation(top_p, top_k)
    counts_T = torch.minimum(targets.counts, _nucleus_counts(targets.logprobs, top_p))
    columns = targets.ids.shape[-1] if top_k is None else min(top_k, targets.ids.shape[-1])
    rows = _pad(
        targets.ids[..., :columns], targets.logprobs[..., :columns], counts_T.clamp(max=columns)
    )
    return TeacherTargets(rows.ids, rows.logprobs, rows.counts, targets.entropy, targets.std)


def sample(logits: Tensor, draws: int, generator: torch.Generator | None = None) -> TeacherTargets:
    """Rows of random sampling (RS-KD, arXiv 2503.16870): `draws` tokens drawn with replacement.

    Args:
        logits: floating [..., V].
        draws: N ≥ 1; a row has at most N entries.
        generator: of the device of `logits`.
    """
    if draws < 1:
        raise ValueError(f"The number of draws a token is {draws}; it must be 1 or more.")
    probs_TV = torch.softmax(logits.float(), dim=-1).reshape(-1, logits.shape[-1])
    drawn_TN = torch.multinomial(probs_TV, draws, replacement=True, generator=generator)
    return rows_of_draws(drawn_TN.reshape(*logits.shape[:-1], draws))


def rows_of_draws(drawn_TN: Tensor) -> TeacherTargets:
    """The row of N drawn ids: each different one with the log of its share of the draws.

    log(count / N) sums to 1, and the expected share is the teacher's probability: the only kind of
    row whose expected gradient is the dense one, and the one kind that no temperature or truncation
    may touch afterwards.

    Args:
        drawn_TN: int [..., N] ids, with repetition.

    Returns:
        Rows of N columns, the ids that were drawn most first.
    """
    ids_TN = drawn_TN.sort(dim=-1).values
    is_first_TN = torch.ones_like(ids_TN, dtype=torch.bool)
    is_first_TN[..., 1:] = ids_TN[..., 1:] != ids_TN[..., :-1]
    run_TN = is_first_TN.cumsum(-1) - 1
    times_TN = torch.zeros_like(ids_TN).scatter_add_(-1, run_TN, torch.ones_like(ids_TN))
    unique_TN = torch.zeros_like(ids_TN).scatter_(-1, run_TN, ids_TN)
    times_TN, order_TN = times_TN.sort(dim=-1, descending=True, stable=True)
    return _pad(
        unique_TN.gather(-1, order_TN),
        (times_TN / drawn_TN.shape[-1]).log(),
        is_first_TN.sum(-1),
    )


def _nucleus_counts(logprobs_TK: Tensor, top_p: float | None) -> Tensor:
    """Entries whose predecessors hold less than top_p; float64, so that 0.95 means 0.95."""
    if top_p is None or top_p == 1.0:
        return torch.full_like(logprobs_TK[..., 0], logprobs_TK.shape[-1], dtype=torch.int64)
    probs_TK = logprobs_TK.double().exp()
    return (probs_TK.cumsum(-1) - probs_TK < top_p).sum(-1)


def _pad(ids_TK: Tensor, logprobs_TK: Tensor, counts_T: Tensor) -> TeacherTargets:
    padding_TK = torch.arange(ids_TK.shape[-1], device=ids_TK.device) >= counts_T.unsqueeze(-1)
    return TeacherTargets(
        ids_TK.int().masked_fill(padding_TK, -1),
        logprobs_TK.float().masked_fill(padding_TK, 0.0),
        counts_T.int(),
    )

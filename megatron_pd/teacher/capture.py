"""Dense teacher logits, split over tensor-parallel ranks → sparse rows.

Axes: T tokens, V this rank's vocabulary, K columns of a row.

The log-sum-exp over the full vocabulary comes from `sparse_log_softmax`, which also gives the
label's log-probability. Each rank then proposes its own top k, the proposals are gathered, and the
top k of those are the row: two small collectives beside two reads of the logits, in their own
precision and layout.

A row of random draws inverts the cumulative distribution instead: each rank has the interval of
[0, 1) that its share of the vocabulary takes, and finds the draws that fall into it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_pd.data.windows import Batch
from megatron_pd.distill.targets import TeacherTargets, rows_of_draws, truncate
from megatron_pd.errors import UserError
from megatron_pd.ops import log_prob_sums, sparse_log_softmax, top_k
from megatron_pd.store import TeacherRows
from megatron_pd.teacher.dump_config import DumpConfig

__all__ = ["CapturedRows", "capture_for", "capture_rows", "rows_of_windows", "uniforms_of"]

# Draws turn so many tokens' logits to float32 at a time: at most 150 MB at V = 150k, and twice that
# for their cumulative distribution.
_CHUNK_TOKENS = 256


class CapturedRows(NamedTuple):
    targets: TeacherTargets
    label_logprob: Tensor  # float32 [...], of the true next token
    lse: Tensor  # float32 [...], log-sum-exp of the logits; not finite where they are no numbers


def capture_for(
    batch: Batch,
    config: DumpConfig,
    *,
    vocab_size: int,
    device: torch.device | int,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> Callable[[Tensor, Tensor], CapturedRows]:
    """From this batch's (logits [B, L, V], labels [B, L]), on `device`, to the rows that a dump
    keeps of it: `capture_rows` with the rest of its arguments."""
    selection: dict[str, Any]
    if config.sampled is None:
        selection = {"top_p": config.top_p, "top_k": config.top_k}
    else:
        selection = {"uniforms": uniforms_of(batch, config.seed, config.sampled).to(device)}
    return functools.partial(
        capture_rows,
        **selection,
        vocab_size=vocab_size,
        tp_group=tp_group,
        statistics=config.statistics,
    )


@dataclass(frozen=True)
class _Ranks:
    """Those over which the vocabulary is split; the collectives of a single one do nothing."""

    group: torch.distributed.ProcessGroup | None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def gathered(self, own: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank."""
        if self.size == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own, group=self.group)
        return parts

    def reduced(self, values: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        """`values`, in place reduced over the ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(values, op=operation, group=self.group)
        return values


def capture_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    top_p: float = 1.0,
    top_k: int = 1,
    uniforms: Tensor | None = None,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup | None = None,
    statistics: bool = False,
) -> CapturedRows:
    """The teacher's rows on every TP rank: top-p, then top-k (Eq. 4's Truncate), or random draws.

    Args:
        logits: [..., V] of this rank's vocabulary shard, any floating dtype, with one leading
            dimension or more; read in place.
        labels: int [...], the true next tokens.
        uniforms: float64 [..., N] in [0, 1), the same on all ranks: a row is then the N draws that
            they make, as `targets.rows_of_draws` gives them, whatever top_p and top_k.
        vocab_size: true vocabulary size; padding beyond it can be no candidate.
        tp_group: the ranks over which the vocabulary is split evenly; None is one rank.
        statistics: also the entropy and the standard deviation of the full distribution's logits.
    """
    ranks = _Ranks(tp_group)
    # Rows are taken as they lie in memory, so that those of Megatron, [L, B, V] as [B, L, V], are
    # not copied.
    order = sorted(range(labels.dim()), key=logits.stride, reverse=True)
    leading = [logits.shape[axis] for axis in order]

    def rows_of(values: Tensor) -> Tensor:
        """[T, …] of what has the leading dimensions."""
        own = range(len(order), values.dim())
        return values.permute(*order, *own).flatten(0, len(order) - 1)

    flat_TV, labels_T = rows_of(logits), rows_of(labels)
    uniforms_TN = None if uniforms is None else rows_of(uniforms)
    parts = []
    for start in range(0, len(flat_TV), _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        logits_TV = flat_TV[chunk]
        if logits_TV.dtype == torch.float64:
            logits_TV = logits_TV.float()  # as rows are
        label_logq_T1, lse_T = sparse_log_softmax(
            logits_TV, labels_T[chunk].unsqueeze(-1), tp_group=tp_group, vocab_size=vocab_size
        )
        first = ranks.rank * logits_TV.shape[1]
        own_TV = logits_TV[:, : max(0, vocab_size - first)]
        if uniforms_TN is None:
            rows = _nuclei(own_TV, lse_T, first, top_p, top_k, ranks)
        else:
            draws_TN = _draw(own_TV.float(), lse_T, first, uniforms_TN[chunk], ranks)
            rows = rows_of_draws(draws_TN)
        if statistics:
            entropy_T, std_T = _statistics(logits_TV, lse_T, first, vocab_size, ranks)
            rows = replace(rows, entropy=entropy_T, std=std_T)
        parts.append(CapturedRows(rows, label_logq_T1.squeeze(-1), lse_T))

    def join(tensors: list[Tensor]) -> Tensor:
        values = torch.cat(tensors).unflatten(0, leading)
        return values.movedim(tuple(range(len(order))), order)

    targets = [part.targets for part in parts]
    return CapturedRows(
        TeacherTargets(
            join([rows.ids for rows in targets]),
            join([rows.logprobs for rows in targets]),
            join([rows.counts for rows in targets]),
            join([rows.entropy for rows in targets if rows.entropy is not None])
            if statistics
            else None,
            join([rows.std for rows in targets if rows.std is not None]) if statistics else None,
        ),
        join([part.label_logprob for part in parts]),
        join([part.lse for part in parts]),
    )


def _nuclei(
    own_TV: Tensor,
    lse_T: Tensor,
    first: int,
    top_p: float,
    top_k: int,
    ranks: _Ranks,
) -> TeacherTargets:
    values_TK, ids_TK = _gathered_top_k(own_TV, first, top_k, ranks)
    found_TK = ids_TK >= 0
    candidates = TeacherTargets(
        ids_TK,
        torch.where(found_TK, values_TK - lse_T.unsqueeze(-1), 0.0),
        found_TK.sum(-1).int(),
    )
    return truncate(candidates, top_p=top_p)


def _gathered_top_k(own_TV: Tensor, first: int, k: int, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """The top k logits over all ranks and their global ids (int32); −1 where there are fewer."""
    values_TK, ids_TK = top_k(own_TV, k, first_id=first, vocab_size=first + own_TV.shape[1])
    if ranks.size > 1:
        all_values, all_ids = (
            torch.cat(ranks.gathered(proposal), dim=-1) for proposal in (values_TK, ids_TK)
        )
        values_TK, order = all_values.topk(k, dim=-1)
        ids_TK = all_ids.gather(-1, order)
    return values_TK, ids_TK


def _draw(
    own_TV: Tensor,
    lse_T: Tensor,
    first: int,
    uniforms_TN: Tensor,
    ranks: _Ranks,
) -> Tensor:
    """Global ids int64 [T, N], drawn from the full distribution.

    float64 sums: in float32 the cumulative probability of 150k tokens ends in steps of 6e-8, and
    the tail, which is what draws are for, would be drawn at a wrong rate.
    """
    cumulative_TV = (own_TV - lse_T.unsqueeze(-1)).exp().cumsum(-1, dtype=torch.float64)
    tokens, shard_size = cumulative_TV.shape
    own_mass_T = cumulative_TV[:, -1] if shard_size else cumulative_TV.new_zeros(tokens)
    ends_TR = torch.stack(ranks.gathered(own_mass_T.contiguous()), dim=-1).cumsum(-1)
    total_T1 = ends_TR[:, -1:]
    below_total_T1 = torch.nextafter(total_T1, torch.zeros_like(total_T1))
    points_TN = torch.minimum(uniforms_TN * total_T1, below_total_T1)
    # The first rank, then the first token, whose interval ends beyond the point.
    rank_TN = torch.searchsorted(ends_TR, points_TN, right=True)
    ids_TN = torch.full_like(rank_TN, -1)
    if shard_size:
        offset_T1 = ends_TR[:, ranks.rank, None] - own_mass_T.unsqueeze(-1)
        local_TN = torch.searchsorted(cumulative_TV, points_TN - offset_T1, right=True)
        is_own_TN = rank_TN == ranks.rank
        ids_TN = torch.where(is_own_TN, local_TN.clamp(max=shard_size - 1) + first, ids_TN)
    return ranks.reduced(ids_TN, torch.distributed.ReduceOp.MAX)


def _statistics(
    logits_TV: Tensor, lse_T: Tensor, first: int, vocab_size: int, ranks: _Ranks
) -> tuple[Tensor, Tensor]:
    """Entropy (nats) and standard deviation of the logits over the full vocabulary: float32 [T].

    A logit of −inf is a token that cannot be: it adds nothing to the entropy, and makes the
    standard deviation infinite.
    """
    sums_T3 = log_prob_sums(logits_TV, lse_T, first_id=first, vocab_size=vocab_size)
    ranks.reduced(sums_T3, torch.distributed.ReduceOp.SUM)
    plogp_T, sum_T, sum_of_squares_T = sums_T3.unbind(-1)
    mean_T, mean_square_T = sum_T / vocab_size, sum_of_squares_T / vocab_size
    variance_T = (mean_square_T - mean_T**2).clamp(min=0)
    std_T = torch.where(mean_T == -torch.inf, torch.inf, variance_T.sqrt())
    return -plogp_T.float(), std_T.float()


def uniforms_of(batch: Batch, seed: int, draws: int) -> torch.Tensor:
    """Random numbers for the draws, float64 [B, L, N]: a function of the window and the seed, so
    that neither the batch, the parallel layout nor a restart changes what is drawn."""
    uniforms = np.zeros((*batch.tokens.shape, draws))
    windows = batch.windows
    spans = np.stack([windows.documents, windows.starts, windows.lengths], axis=1).tolist()
    for row, (document, start, length) in enumerate(spans):
        random = np.random.default_rng([seed, document, start])
        uniforms[row, :length] = random.random((length, draws))
    return torch.from_numpy(uniforms)


def rows_of_windows(batch: Batch, captured: CapturedRows) -> TeacherRows:
    """The rows of all windows' tokens, one window after another, as the store takes them.

    Raises:
        UserError: the logits of a token are not finite.
    """
    filled = batch.filled.to(captured.lse.device)

    def filled_rows(values: Tensor) -> np.ndarray:
        return values[filled].cpu().numpy()

    if not (finite := filled_rows(torch.isfinite(captured.lse))).all():
        documents, offsets, _ = batch.windows.rows
        row = int(np.argmin(finite))
        raise UserError(
            f"The teacher's logits at document {documents[row]}, offset {offsets[row]} hold NaN or "
            "infinity. Check the checkpoint's weights, and the precision that it runs in."
        )
    targets = captured.targets
    statistics = {"label_logprob": captured.label_logprob}
    if targets.entropy is not None and targets.std is not None:
        statistics |= {"entropy": targets.entropy, "std": targets.std}
    return TeacherRows(
        filled_rows(targets.ids),
        filled_rows(targets.logprobs),
        filled_rows(targets.counts),
        {name: filled_rows(values) for name, values in statistics.items()},
    )

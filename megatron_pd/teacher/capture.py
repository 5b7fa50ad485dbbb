"""Dense teacher logits, split over tensor-parallel ranks → sparse rows.

Axes: T tokens, V this rank's vocabulary, K columns of a row.

The log-sum-exp over the full vocabulary comes from `sparse_log_softmax`, which also gives the
label's log-probability. Each rank then proposes its own top k, the proposals are gathered, and the
top k of those are the row: two small collectives beside one read of the logits and one top-k.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_pd.ops import sparse_log_softmax
from megatron_pd.targets import TeacherTargets, truncate

__all__ = ["CapturedRows", "capture_rows"]

# Logits are turned to float32 for so many tokens at a time: at most 150 MB at V = 150k.
_CHUNK_TOKENS = 256


class CapturedRows(NamedTuple):
    targets: TeacherTargets
    label_logprob: Tensor  # float32 [...], of the true next token


def capture_rows(
    logits: Tensor,
    labels: Tensor,
    *,
    top_p: float,
    top_k: int,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup,
    statistics: bool = False,
) -> CapturedRows:
    """The top-p, then top-k rows of the teacher (Eq. 4's Truncate) on every TP rank.

    Args:
        logits: [..., V] of this rank's vocabulary shard, any floating dtype.
        labels: int [...], the true next tokens.
        vocab_size: true vocabulary size; padded columns beyond it can be no candidates.
        statistics: also the entropy and the standard deviation of the full distribution's logits.
    """
    leading = logits.shape[:-1]
    flat_TV, labels_T = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    parts = [
        _capture(
            flat_TV[start : start + _CHUNK_TOKENS].float(),
            labels_T[start : start + _CHUNK_TOKENS],
            top_p,
            top_k,
            vocab_size,
            tp_group,
            statistics,
        )
        for start in range(0, len(flat_TV), _CHUNK_TOKENS)
    ]

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).reshape(*leading, *tensors[0].shape[1:])

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
    )


def _capture(
    logits_TV: Tensor,
    labels_T: Tensor,
    top_p: float,
    top_k: int,
    vocab_size: int,
    tp_group: torch.distributed.ProcessGroup,
    statistics: bool,
) -> CapturedRows:
    label_logq_T1, lse_T = sparse_log_softmax(
        logits_TV, labels_T.unsqueeze(-1), tp_group=tp_group, vocab_size=vocab_size
    )
    first = tp_group.rank() * logits_TV.shape[1]
    own_TV = logits_TV[:, : max(0, vocab_size - first)]
    values_TK, ids_TK = _gathered_top_k(own_TV, first, top_k, tp_group)
    found_TK = ids_TK >= 0
    entropy_T, std_T = (
        _statistics(own_TV, lse_T, vocab_size, tp_group) if statistics else (None, None)
    )
    candidates = TeacherTargets(
        ids_TK,
        torch.where(found_TK, values_TK - lse_T.unsqueeze(-1), 0.0),
        found_TK.sum(-1).int(),
        entropy_T,
        std_T,
    )
    return CapturedRows(truncate(candidates, top_p=top_p), label_logq_T1.squeeze(-1))


def _gathered_top_k(
    own_TV: Tensor, first: int, top_k: int, tp_group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The top k logits over all ranks and their global ids (int32); −1 where there are fewer."""
    values_TK = own_TV.new_full((len(own_TV), top_k), -torch.inf)
    ids_TK = torch.full_like(values_TK, -1, dtype=torch.int32)
    proposals = min(top_k, own_TV.shape[1])
    values_TK[:, :proposals], indices = own_TV.topk(proposals, dim=-1)
    ids_TK[:, :proposals] = indices.int() + first
    if tp_group.size() > 1:
        gathered = []
        for proposal in (values_TK, ids_TK):
            parts = [torch.empty_like(proposal) for _ in range(tp_group.size())]
            torch.distributed.all_gather(parts, proposal, group=tp_group)
            gathered.append(torch.cat(parts, dim=-1))
        values_TK, order = gathered[0].topk(top_k, dim=-1)
        ids_TK = gathered[1].gather(-1, order)
    return values_TK, ids_TK.masked_fill(values_TK == -torch.inf, -1)


def _statistics(
    own_TV: Tensor, lse_T: Tensor, vocab_size: int, tp_group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Entropy (nats) and standard deviation of the logits over the full vocabulary: float32 [T]."""
    logp_TV = own_TV - lse_T.unsqueeze(-1)
    # A logit of −inf is a token that cannot be: it adds nothing to the entropy, and makes the
    # standard deviation infinite, as it should.
    plogp_TV = torch.where(logp_TV == -torch.inf, 0.0, logp_TV.exp() * logp_TV)
    sums = torch.stack([x.sum(-1, dtype=torch.float64) for x in (plogp_TV, logp_TV, logp_TV**2)])
    torch.distributed.all_reduce(sums, group=tp_group)
    mean_T, mean_square_T = sums[1] / vocab_size, sums[2] / vocab_size
    return -sums[0].float(), (mean_square_T - mean_T**2).clamp(min=0).sqrt().float()

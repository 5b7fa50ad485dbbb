"""What sparse_log_softmax computes, written for reading: float64, dense, one rank, slow."""

import torch
from torch import Tensor

__all__ = ["sparse_log_softmax_reference"]


def sparse_log_softmax_reference(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (logq [..., K], lse [...]) in float64; differentiable by autograd.

    Args:
        logits: [..., V], any floating dtype.
        ids: [..., K] integer ids below `vocab_size`, -1 where a row has fewer than K.
        temperature: a number, or a tensor that broadcasts to [...].
        vocab_size: ids from here on pad the vocabulary and count for nothing; default V.
    """
    temperature_ = torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1)
    scaled_V = logits[..., :vocab_size].double() / temperature_
    lse = scaled_V.logsumexp(dim=-1)
    logq_V = scaled_V - lse.unsqueeze(-1)
    logq_K = logq_V.gather(-1, ids.clamp(min=0).long())
    return torch.where(ids >= 0, logq_K, 0.0), lse

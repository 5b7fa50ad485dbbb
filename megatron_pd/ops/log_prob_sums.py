"""What entropy and standard deviation of rows of logits are made of, of a vocabulary shard.

On the CPU by an operator of ours, which reads a row once; composed of torch's, it takes a hundred
times as long there. On other devices by torch's.
"""

import torch
from torch import Tensor

from megatron_pd.ops.library import operators
from megatron_pd.ops.rows import as_rows

__all__ = ["log_prob_sums"]


def log_prob_sums(logits: Tensor, lse: Tensor, *, first_id: int, vocab_size: int) -> Tensor:
    """Return float64 [..., 3]: Σ p·log p, Σ log p and Σ (log p)² over each row, log p = z − lse.

    Those of the shards of a vocabulary add up to those of the whole.

    Args:
        logits: [..., V] float64, float32, bfloat16 or float16; this rank's shard of the vocabulary.
        lse: [...], float32 (float64 for float64 logits), log-sum-exp of the whole rows.
        first_id: global id of the first logit.
        vocab_size: true vocabulary size; ids from there on pad the vocabulary and are left out.

    A logit of −inf, a token that cannot be, adds nothing to the first, and makes the others −inf
    and inf.
    """
    if logits.is_cuda:
        return _torch_sums(logits, lse, first_id, vocab_size)
    sums = operators.log_prob_sums(
        as_rows(logits), lse.reshape(-1).contiguous(), first_id, vocab_size
    )
    return sums.view(*logits.shape[:-1], 3)


def _torch_sums(logits: Tensor, lse: Tensor, first_id: int, vocab_size: int) -> Tensor:
    own = logits[..., : max(0, vocab_size - first_id)].to(lse.dtype)
    logp = own - lse.unsqueeze(-1)
    plogp = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
    return torch.stack([x.sum(-1, dtype=torch.float64) for x in (plogp, logp, logp**2)], dim=-1)

"""The top k logits of each row, of a vocabulary shard.

On the CPU by an operator of ours, which reads a row once and a part of it again; torch's `topk`
takes several times as long there. On other devices by torch's.
"""

import torch
from torch import Tensor

from megatron_pd.ops.library import operators
from megatron_pd.ops.rows import as_rows

__all__ = ["top_k"]


def top_k(logits: Tensor, k: int, *, first_id: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return `(values, ids)`: each row's k largest logits, and their vocabulary ids.

    Args:
        logits: [..., V] float64, float32, bfloat16 or float16; this rank's shard of the vocabulary.
        k: at least 1.
        first_id: global id of its first logit.
        vocab_size: true vocabulary size; ids from there on pad the vocabulary and are no one's.

    Returns:
        values [..., k], float32 (float64 for float64 logits), the largest first, −inf where there
        are fewer than k; global ids int32 [..., k], −1 there. A logit of −inf or NaN is never
        among them. On the CPU the lower id comes first of equals, and is kept.

    Raises:
        ValueError: k is less than 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}.")
    if logits.is_cuda:
        values, ids = _torch_top_k(logits, k, first_id, vocab_size)
    else:
        values, ids = operators.top_k(as_rows(logits), k, first_id, vocab_size)
    shape = (*logits.shape[:-1], k)
    return values.view(shape), ids.view(shape)


def _torch_top_k(logits: Tensor, k: int, first_id: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    own = logits[..., : max(0, vocab_size - first_id)]
    own = own.masked_fill(own.isnan(), -torch.inf)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = torch.full((*own.shape[:-1], k), -torch.inf, dtype=dtype, device=own.device)
    ids = torch.full(values.shape, -1, dtype=torch.int32, device=own.device)
    found = min(k, own.shape[-1])
    top, columns = own.topk(found, dim=-1)
    values[..., :found], ids[..., :found] = top.to(dtype), columns.int() + first_id
    return values, ids.masked_fill(values == -torch.inf, -1)

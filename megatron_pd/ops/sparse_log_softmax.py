"""Log-softmax of the student at chosen vocabulary ids, and its gradient, on vocabulary shards.

    logq[t, j] = z[t, ids[t, j]]/τ − lse[t],   lse[t] = log Σ_v exp(z[t, v]/τ)
    dz[t, v]   = (Σ_j g[t, j]·1[v = ids[t, j]] − (Σ_j g[t, j] − g_lse[t])·softmax(z_t/τ)[v]) / τ

with g, g_lse the gradients of logq and lse. Every loss on the student's distribution that looks at
K ids is a few lines on logq and lse, and the whole of it costs

  forward   one read of the logits: per row the maximum, Σ exp and the K raw logits
  backward  one read and one write of the logits, over their own buffer when asked

in the logits' own dtype with float32 sums (float64 for float64 logits), at one temperature or at
two (`sparse_log_softmaxes`). No other tensor has the vocabulary's size. Saved for backward: the
logits, the ids, and [T] and [T, N+K] statistics.

Tensor parallel: rank r of `tp_group` holds the ids [r·V, (r+1)·V). Forward does two all-reduces,
the maximum [T] and one packed sum [T, N+K]. Backward does none: the loss and so g is the same on
all ranks, and the formula gives each rank the gradient of its own shard from the reduced
statistics. An all-reduce that autograd sees would multiply the gradient by the number of ranks.

Legend: S, B leading dimensions, T = S·B rows, V this rank's vocabulary, K ids per row, N
temperatures of each row.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_pd.ops.library import has_cuda_kernels, operators
from megatron_pd.ops.rows import as_rows

__all__ = ["sparse_log_softmax", "sparse_log_softmaxes"]

_CHECK_ON_GPU = os.environ.get("MEGATRON_PD_CHECK_INPUTS") == "1"
_MOST_TEMPERATURES = 2
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sparse_log_softmax(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(logq, lse)`: log_softmax(logits / temperature) at `ids`, and its log-sum-exp.

    Args:
        logits: [..., V] float64, float32, bfloat16 or float16; this rank's shard of the vocabulary.
            Leading dimensions may be strided (a slice or transpose of [s, b, V] isn't copied).
        ids: [..., K] int32 or int64 ids of the whole vocabulary, the same on all ranks. -1 is
            padding: its logq is 0 and passes no gradient. Ids may repeat within a row.
        temperature: a positive number, or a tensor that broadcasts to [...] (one per row). It gets
            no gradient.
        tp_group: the ranks over which the vocabulary is split evenly; None is one rank.
        inplace_backward: the backward pass writes the gradient over the logits. Nothing else may
            use the logits afterwards: a second backward through them raises.
        vocab_size: true vocabulary size. Columns of ids from there on pad the vocabulary: they are
            left out of lse and get a gradient of exactly 0. Default: V times the number of ranks.

    Returns:
        logq [..., K] and lse [...], float32 (float64 for float64 logits), the same on all ranks.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, temperature or vocab_size don't fit.
        IndexError: an id is below -1 or not below `vocab_size`.

    On CUDA, looking at ids or at a temperature tensor would take a synchronisation. There the logq
    of a wrong id is NaN, and temperatures aren't looked at, unless the environment has
    MEGATRON_PD_CHECK_INPUTS=1 (the checked mode): then both raise as on the CPU. A compiled graph
    is never checked.
    """
    ((logq, lse),) = sparse_log_softmaxes(
        logits,
        ids,
        (temperature,),
        tp_group=tp_group,
        inplace_backward=inplace_backward,
        vocab_size=vocab_size,
    )
    return logq, lse


def sparse_log_softmaxes(
    logits: Tensor,
    ids: Tensor,
    temperatures: Sequence[float | Tensor],
    *,
    tp_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    vocab_size: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return `(logq, lse)` of `sparse_log_softmax` at each of one or two temperatures.

    The logits are read once forward, and read and written once backward, whichever it is.

    Raises:
        ValueError: there are no temperatures, or more than two; and as `sparse_log_softmax`.
    """
    if not 1 <= len(temperatures) <= _MOST_TEMPERATURES:
        raise ValueError(
            f"There are {len(temperatures)} temperatures; expected 1 to {_MOST_TEMPERATURES}."
        )
    ranks = 1 if tp_group is None else tp_group.size()
    rank = 0 if tp_group is None else tp_group.rank()
    _check(logits, ids, vocab_size, ranks)
    leading, shard_size = logits.shape[:-1], logits.shape[-1]
    if vocab_size is None:
        vocab_size = shard_size * ranks
    ids_TK = ids.reshape(math.prod(leading), ids.shape[-1]).contiguous()
    temperatures_TN = _per_row(temperatures, logits)
    if _CHECK_ON_GPU and logits.is_cuda and not torch.compiler.is_compiling():
        _check_values(ids_TK, temperatures_TN, vocab_size)
    logq_TNK, lse_TN = _SparseLogSoftmax.apply(
        as_rows(logits),
        ids_TK,
        temperatures_TN,
        rank * shard_size,
        vocab_size,
        tp_group if ranks > 1 else None,
        inplace_backward,
    )
    if len(temperatures) == 1:  # unbinding one costs a copy in backward
        return [(logq_TNK.view(ids.shape), lse_TN.view(leading))]
    return [
        (logq_TK.view(ids.shape), lse_T.view(leading))
        for logq_TK, lse_T in zip(logq_TNK.unbind(1), lse_TN.unbind(1), strict=True)
    ]


class _SparseLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_SBV: Tensor,
        ids_TK: Tensor,
        temperatures_TN: Tensor,
        first_id: int,
        vocab_size: int,
        tp_group: dist.ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        max_T, sums = operators.sparse_log_softmax_forward(
            logits_SBV, ids_TK, temperatures_TN, first_id, vocab_size
        )
        if tp_group is not None:
            max_T, sums = _reduce_over_shards(max_T, sums, temperatures_TN, tp_group)
        ctx.save_for_backward(logits_SBV, ids_TK, temperatures_TN, max_T, sums)
        ctx.shard = first_id, vocab_size
        ctx.inplace_backward = inplace_backward

        sums_TN, chosen_TK = sums.split([temperatures_TN.shape[1], ids_TK.shape[1]], dim=1)
        log_sum_TN, max_T1 = sums_TN.log(), max_T.unsqueeze(1)
        # z − max first: it is exact where z and lse are large and close to each other.
        from_max_TNK = (chosen_TK - max_T1).unsqueeze(1) / temperatures_TN.unsqueeze(2)
        padding_T1K = (ids_TK == -1).unsqueeze(1)
        logq_TNK = (from_max_TNK - log_sum_TN.unsqueeze(2)).masked_fill(padding_T1K, 0.0)
        return logq_TNK, max_T1 / temperatures_TN + log_sum_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logq_TNK, grad_lse_TN = (gradient.contiguous() for gradient in gradients)
        logits_SBV, *saved = ctx.saved_tensors
        arguments = (logits_SBV, *saved, grad_logq_TNK, grad_lse_TN, *ctx.shard)
        if ctx.inplace_backward:
            operators.sparse_log_softmax_backward_(*arguments)
            # Lets autograd refuse any later use of the logits that are no longer there.
            torch.autograd.graph.increment_version(logits_SBV)
            grad_SBV = logits_SBV
        else:
            grad_SBV = operators.sparse_log_softmax_backward(*arguments)
        return grad_SBV, None, None, None, None, None, None


def _reduce_over_shards(
    max_T: Tensor, sums: Tensor, temperatures_TN: Tensor, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Statistics of the whole vocabulary from those of this rank's shard."""
    shard_max_T = max_T.clone()
    dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=tp_group)
    # A shard of padding or −inf alone has the maximum −inf and the sum 0, which stays 0.
    rescale_TN = ((shard_max_T - max_T).unsqueeze(1) / temperatures_TN).exp()
    empty_T1 = (shard_max_T == -torch.inf).unsqueeze(1)
    sums[:, : temperatures_TN.shape[1]] *= torch.where(empty_T1, 1.0, rescale_TN)
    # An id's raw logit is on one rank and 0 on the others, so its sum is exact.
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=tp_group)
    return max_T, sums


def _per_row(temperatures: Sequence[float | Tensor], logits: Tensor) -> Tensor:
    """Temperatures as [1, N] or [T, N] on the logits' device, in the dtype of the sums."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns = [_column(temperature, logits, dtype) for temperature in temperatures]
    if len(columns) == 1:
        return columns[0].contiguous().unsqueeze(1)
    return torch.stack(torch.broadcast_tensors(*columns), dim=1)


def _column(temperature: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[1] or [T]."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}.")
        return torch.full((1,), temperature, dtype=dtype, device=logits.device)
    temperature = temperature.detach().to(device=logits.device, dtype=dtype)
    try:
        per_row = temperature.expand(logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"temperature has the shape {tuple(temperature.shape)}, which doesn't broadcast to the "
            f"logits' rows {tuple(logits.shape[:-1])}."
        ) from None
    return per_row.reshape(-1)


def _check_values(ids_TK: Tensor, temperatures_TN: Tensor, vocab_size: int) -> None:
    """What the CPU kernels check themselves and the CUDA kernels can't; waits for the GPU."""
    wrong_TK = (ids_TK < -1) | (ids_TK >= vocab_size)
    if wrong_TK.any():
        row, column = (int(index) for index in wrong_TK.nonzero()[0])
        raise IndexError(
            f"ids[{row}, {column}] is {int(ids_TK[row, column])}: expected -1 (padding) or a "
            f"vocabulary id from 0 to {vocab_size - 1}."
        )
    if not (temperatures_TN > 0).all():
        raise ValueError(f"temperature must be positive; got {float(temperatures_TN.min()):g}.")


def _check(logits: Tensor, ids: Tensor, vocab_size: int | None, ranks: int) -> None:
    if logits.dim() < 1 or ids.dim() != logits.dim() or ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            "logits must be [..., V] and ids [..., K] with the same leading dimensions; got "
            f"{tuple(logits.shape)} and {tuple(ids.shape)}."
        )
    if logits.dtype not in _FLOATS:
        raise TypeError(
            f"logits must be float64, float32, bfloat16 or float16; got {logits.dtype}."
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64; got {ids.dtype}.")
    if ids.device != logits.device:
        raise ValueError(f"ids are on {ids.device} but the logits are on {logits.device}.")
    if vocab_size is not None and not 0 < vocab_size <= logits.shape[-1] * ranks:
        raise ValueError(
            f"vocab_size must be between 1 and the logits' {logits.shape[-1] * ranks} ids "
            f"({logits.shape[-1]} on each of {ranks} ranks); got {vocab_size}."
        )
    if logits.is_cuda and not has_cuda_kernels():
        raise RuntimeError(
            "The logits are on a GPU, but megatron_pd was built without its CUDA kernels. Build "
            "them where nvcc is installed: `MEGATRON_PD_BUILD_CUDA=1 pip install "
            "--no-build-isolation -e .` in the project's folder."
        )

"""Output layer and losses on pieces of the sequence, whose gradient is taken in the forward pass.

    for each chunk   logits = hidden · Wᵀ, losses, dlogits over the logits,
                     dhidden = dlogits · W into its place, dW += dlogitsᵀ · hidden

so that the logits of one chunk exist at a time and the layer costs three matrix products, as it
does without chunks: nothing is computed again in the backward pass. The gradient that the losses
will get there has to be known in the forward pass, up to one factor that is the same for all
tokens: backward checks that, and multiplies dhidden and dW by the factor. No hidden state is kept,
but dhidden and a float32 dW are, from a micro-batch's forward pass to its backward pass.

Tensor parallel: the layer gathers hidden states under sequence parallelism, as ever. dhidden is
summed over the ranks here (scattered under sequence parallelism) while dW is computed, and the
hidden states are gathered once more for dW: Megatron's collectives of the layer's backward pass.

Axes: S sequence, B micro-batch, H hidden, V this rank's vocabulary, T = S·B tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Layer", "losses_in_chunks"]

_TOLERANCE = 1e-5
_WRONG_GRADIENT = (
    "--pd-loss-chunk-tokens: the gradient of the per-token losses is not the one that the forward "
    "pass assumed (loss mask, alpha and a factor that all tokens share). What weighs the losses "
    "otherwise must do so in DistillationContext.expected_gradient, or train without the flag."
)


class Layer(NamedTuple):
    """The output layer, as a chunk needs it."""

    logits_of: Callable[[Tensor], Tensor]
    """Hidden states [S / tp, B, H] under sequence parallelism, else [S, B, H] → [S, B, V]."""

    tp_group: dist.ProcessGroup
    sequence_parallel: bool

    fuses: bool
    """Whether Megatron adds the weight's gradient to `main_grad` (gradient accumulation fusion)."""

    @property
    def gathered_ranks(self) -> int:
        return self.tp_group.size() if self.sequence_parallel else 1


def losses_in_chunks(
    layer: Layer,
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    losses_of: Callable[[Tensor, "Chunk"], Tensor],
    expected_2SB: Tensor,
    length: int,
) -> Tensor:
    """float32 [2, S, B], the losses of `losses_of(logits, chunk)`, which are [2, S of a chunk, B].

    Args:
        expected_2SB: float32, the gradient of the losses in the backward pass, up to one factor.
        length: local sequence positions of a chunk.
    Raises:
        RuntimeError: in backward, where another gradient arrives; an assertion on the GPU, there.
    """
    return _LossesInChunks.apply(
        hidden_SBH, weight_VH, layer, losses_of, expected_2SB, length, torch.is_grad_enabled()
    )


class Chunk(NamedTuple):
    """Which positions of the whole sequence a chunk holds.

    Under sequence parallelism every rank holds consecutive positions, and the layer gathers the
    same piece of each.
    """

    start: int
    stop: int
    ranks: int

    def of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The chunk of a tensor with the axis S at `dim`; a view where the ranks are one."""
        return self._pieces(whole, dim).flatten(dim, dim + 1)

    def put(self, part: Tensor, whole: Tensor, dim: int) -> None:
        """Write the chunk into `whole`."""
        pieces = self._pieces(whole, dim)
        pieces.copy_(part.reshape(pieces.shape))

    def _pieces(self, whole: Tensor, dim: int) -> Tensor:
        by_rank = whole.unflatten(dim, (self.ranks, -1))
        return by_rank.narrow(dim + 1, self.start, self.stop - self.start)


class _LossesInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SBH: Tensor,
        weight_VH: Tensor,
        layer: Layer,
        losses_of: Callable[[Tensor, Chunk], Tensor],
        expected_2SB: Tensor,
        length: int,
        differentiates: bool,
    ) -> Tensor:
        gradients = None
        if differentiates:
            gradients = _Gradients(layer, hidden_SBH, weight_VH, ctx.needs_input_grad[1])
        losses_2SB = torch.empty_like(expected_2SB)
        for start in range(0, len(hidden_SBH), length):
            chunk = Chunk(start, min(start + length, len(hidden_SBH)), ranks=layer.gathered_ranks)
            logits_SBV = layer.logits_of(hidden_SBH[chunk.start : chunk.stop])
            with torch.set_grad_enabled(differentiates):
                part_2SB = losses_of(logits_SBV.requires_grad_(differentiates), chunk)
            chunk.put(part_2SB.detach(), losses_2SB, dim=1)
            if gradients is not None:
                upstream = chunk.of(expected_2SB, dim=1)
                (grad_SBV,) = torch.autograd.grad(part_2SB, logits_SBV, upstream)
                gradients.add(chunk, grad_SBV)
                del grad_SBV
            del logits_SBV, part_2SB  # the next chunk's take their memory
        if gradients is not None:
            ctx.save_for_backward(expected_2SB, gradients.hidden_SBH, gradients.weight_VH)
            ctx.weight, ctx.fuses = weight_VH, layer.fuses
        return losses_2SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        expected_2SB, hidden_SBH, weight_VH = ctx.saved_tensors
        factor_1 = _common_factor(gradients[0], expected_2SB)
        # In place, so that autograd refuses a second backward pass. A factor of one dimension is
        # applied in float32, one of none would be rounded to bfloat16 first.
        hidden_SBH.mul_(factor_1)
        return hidden_SBH, _given_to(ctx.weight, weight_VH, factor_1, ctx.fuses), *(None,) * 5


class _Gradients:
    """Those of hidden states and weight, chunk by chunk."""

    def __init__(
        self, layer: Layer, hidden_SBH: Tensor, weight_VH: Tensor, of_weight: bool
    ) -> None:
        self.layer, self._hidden_SBH, self._weight_VH = layer, hidden_SBH, weight_VH
        self.hidden_SBH = torch.empty_like(hidden_SBH, memory_format=torch.contiguous_format)
        self.weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if of_weight else None

    def add(self, chunk: Chunk, grad_logits_SBV: Tensor) -> None:
        group = self.layer.tp_group
        own_SBH = self._hidden_SBH[chunk.start : chunk.stop]
        grad_TV = grad_logits_SBV.flatten(0, 1)
        out_TH = self.hidden_SBH[chunk.start : chunk.stop].flatten(0, 1)
        work = None
        if self.layer.gathered_ranks > 1:
            gathered_SBH = own_SBH.new_empty(len(own_SBH) * group.size(), *own_SBH.shape[1:])
            dist.all_gather_into_tensor(gathered_SBH, own_SBH.contiguous(), group=group)
            of_shard_TH = grad_TV @ self._weight_VH
            work = dist.reduce_scatter_tensor(out_TH, of_shard_TH, group=group, async_op=True)
            own_SBH = gathered_SBH
        else:
            torch.mm(grad_TV, self._weight_VH, out=out_TH)
            if group.size() > 1:
                work = dist.all_reduce(out_TH, group=group, async_op=True)
        if self.weight_VH is not None:
            _add_product(self.weight_VH, grad_TV, own_SBH.flatten(0, 1), self.layer.fuses)
        if work is not None:
            work.wait()


def _add_product(total_VH: Tensor, grad_TV: Tensor, hidden_TH: Tensor, fuses: bool) -> None:
    """total += gradᵀ · hidden, in float32."""
    if fuses:
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden_TH, grad_TV, total_VH)
    elif grad_TV.dtype == torch.float32:
        total_VH.addmm_(grad_TV.T, hidden_TH)
    else:
        total_VH.add_(grad_TV.T @ hidden_TH)


def _common_factor(found: Tensor, expected: Tensor) -> Tensor:
    """[1], c of found = c · expected; asserts that there is one without waiting for a GPU."""
    factor = (found * expected).sum() / expected.square().sum().clamp(min=1e-30)
    assumed = factor * expected
    wrong = (found - assumed).abs().max() > _TOLERANCE * assumed.abs().max()
    torch._assert_async(~(wrong | ~factor.isfinite()), _WRONG_GRADIENT)
    return factor.reshape(1)


def _given_to(
    weight: Any, gradient_VH: Tensor | None, factor_1: Tensor, fuses: bool
) -> Tensor | None:
    """What autograd gets for the weight, as Megatron's own layer does it."""
    if gradient_VH is None:
        return None
    if fuses and hasattr(weight, "grad_added_to_main_grad"):
        weight.main_grad.addcmul_(gradient_VH, factor_1)
        weight.grad_added_to_main_grad = True
        return torch.zeros_like(weight)
    return torch.mul(gradient_VH, factor_1, out=torch.empty_like(weight))

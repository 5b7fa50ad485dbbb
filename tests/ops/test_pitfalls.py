"""Mistakes known from distillation losses elsewhere, each shown not to be made here.

docs/engine.md lists those that can't happen in this operator, and the tensor-parallel ones are in
test_tensor_parallel.py.
"""

import math
from typing import Any

import pytest
import torch
from agreement import Case, assert_agrees
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pd.ops import sparse_log_softmax


def test_log_probabilities_of_bf16_logits_are_not_rounded_to_bf16() -> None:
    """Log-sum-exp rounded to bf16 before the subtraction is off by 0.06 at the size it has here."""
    logits = (torch.randn(64, 30_000) * 4).bfloat16()
    logq, lse = sparse_log_softmax(logits, torch.randint(0, 30_000, (64, 10)))
    assert lse.min() > 15
    assert logq.dtype == lse.dtype == torch.float32
    assert_agrees(Case(logits, torch.randint(0, 30_000, (64, 10))))


def test_gradient_of_an_unnormalised_teacher_is_mass_times_softmax_less_teacher() -> None:
    """With raw teacher mass m < 1 the gradient is m·p − t: p − t pushes the student's head up,
    and renormalising both sides would leave the other logits without gradient."""
    logits = torch.randn(5, 200, requires_grad=True)
    ids = torch.stack([torch.randperm(200)[:20] for _ in range(5)])
    teacher = torch.rand(5, 20)
    teacher = teacher / teacher.sum(-1, keepdim=True) * 0.8
    logq, _ = sparse_log_softmax(logits, ids)
    (-(teacher * logq).sum()).backward()
    dense_teacher = torch.zeros(5, 200).scatter(1, ids, teacher)
    expected = 0.8 * logits.detach().softmax(-1) - dense_teacher
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)
    assert (logits.grad[dense_teacher == 0] > 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_logits_of_any_size(offset: float) -> None:
    """exp of raw logits overflows at 89; here the maximum goes first, and z − max is exact."""
    spread = torch.randn(4, 600).mul(8).round()
    assert_agrees(Case(spread + offset, torch.randint(0, 600, (4, 8))))
    logq, _ = sparse_log_softmax(torch.full((1, 600), offset * 1e34), torch.tensor([[7]]))
    assert abs(logq.item() + math.log(600)) < 1e-6


def test_student_that_gives_the_teacher_ids_no_probability() -> None:
    """log of a sum over the teacher's ids alone is log(0) here; log-probabilities stay finite, and
    no clamp removes the gradient where the student is worst."""
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 200.0
    logits.requires_grad_()
    logq, _ = sparse_log_softmax(logits, torch.tensor([[5, 6]]))
    assert torch.equal(logq, torch.full((1, 2), -200.0))
    (-logq.sum()).backward()
    assert logits.grad[0, 5] == -1 and logits.grad[0, 6] == -1 and logits.grad[0, 0] == 2


@pytest.mark.parametrize("temperature", [0.25, 2.0, torch.tensor([0.5, 1.0, 4.0])])
def test_temperature_scales_value_and_gradient_alike(temperature: float | Tensor) -> None:
    """A factor applied to the reported loss and not to its gradient, or the reverse, would fail."""
    assert_agrees(Case(torch.randn(3, 500) * 5, torch.randint(0, 500, (3, 20)), temperature))


def test_padding_takes_no_part_even_with_infinite_gradients_around() -> None:
    """Padding is masked by its id, not by nan_to_num: −inf in a padded column's upstream gradient
    would come back as NaN if it were multiplied by 0."""
    logits = torch.randn(2, 100, requires_grad=True)
    logq, lse = sparse_log_softmax(logits, torch.tensor([[3, -1, -1], [-1, -1, -1]]))
    assert torch.equal(logq[logq == 0], torch.zeros(5))
    upstream = torch.tensor([[1.0, math.inf, math.nan], [math.nan, -math.inf, 1.0]])
    torch.autograd.backward([logq, lse], [upstream, torch.zeros(2)])
    expected = -logits.detach()[0].softmax(-1)
    expected[3] += 1
    torch.testing.assert_close(logits.grad[0], expected)
    assert torch.equal(logits.grad[1], torch.zeros(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repeated_ids_accumulate_exactly_and_always_alike(dtype: torch.dtype) -> None:
    """The label is usually one of the teacher's ids. Atomic additions in bf16 would lose small
    terms and depend on their order: here 300 equal gradients on one id sum up in float32."""
    logits = torch.randn(4, 700).to(dtype)
    ids = torch.full((4, 300), 123)
    ids[:, 100:200] = torch.randint(0, 700, (4, 100))
    case = Case(logits, ids, grad_logq=torch.full((4, 300), 1e-3), grad_lse=torch.zeros(4))
    assert_agrees(case)
    first, second = case.result()[2], case.result()[2]
    assert torch.equal(first, second)


def test_label_in_column_0_is_a_teacher_id_too() -> None:
    """LM and KD loss on one call: −α_lm·logq[label] − α_kd·Σ t·logq."""
    labels = torch.randint(0, 50, (6, 1))
    teacher_ids = torch.stack([torch.randperm(50)[:8] for _ in range(6)])
    teacher_ids[:, 2:3] = labels
    weights = torch.rand(6, 9)
    assert_agrees(Case(torch.randn(6, 50), torch.cat([labels, teacher_ids], 1), grad_logq=-weights))


def test_padded_vocabulary_columns() -> None:
    """Megatron pads the vocabulary to a multiple of tp: those columns hold anything, count for
    nothing, and their gradient is exactly 0."""
    logits = torch.randn(3, 128)
    logits[:, 100:] = 1e4
    logits[0, 127] = torch.nan
    case = Case(logits, torch.randint(0, 100, (3, 6)), vocab_size=100)
    _, lse, grad = case.result()
    assert lse.max() < 10
    assert torch.equal(grad[:, 100:], torch.zeros(3, 28))
    assert_agrees(Case(logits.nan_to_num(), case.ids, vocab_size=100))
    _, _, in_place = case.result(inplace_backward=True)
    assert torch.equal(in_place, grad)


class SavedTensors:
    """Collects what autograd saves for the backward pass."""

    def __enter__(self) -> list[Tensor]:
        saved: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        )
        self.hooks.__enter__()
        return saved

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)


def test_nothing_of_the_vocabularys_size_is_saved_but_the_logits() -> None:
    """Chunking a loss saves no memory if every chunk keeps a float32 copy for its backward pass.
    The ids aren't widened either: 18-bit ids unpacked to int64 took 18 KB per token elsewhere."""
    logits = torch.randn(16, 5000).bfloat16().requires_grad_()
    ids = torch.randint(0, 5000, (16, 10), dtype=torch.int32)
    with SavedTensors() as saved:
        sparse_log_softmax(logits, ids)
    others = [tensor for tensor in saved if tensor.data_ptr() != logits.data_ptr()]
    assert len(others) == len(saved) - 1
    assert sum(tensor.nbytes for tensor in others) <= 16 * (4 * 10 + 4 * 11 + 4 + 4)
    assert any(tensor.data_ptr() == ids.data_ptr() for tensor in others)


class NewBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator creates."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.alive.append(storage)  # so that its address can't be given out again
                self.bytes += storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_allocated_is_3_percent_of_the_logits(dtype: torch.dtype) -> None:
    """Even if nothing were freed between the first operator and the last."""
    logits = torch.randn(32, 151_552).to(dtype).requires_grad_()
    ids = torch.randint(0, 151_552, (32, 51), dtype=torch.int32)
    with NewBytes(logits, ids) as new:
        logq, _ = sparse_log_softmax(logits, ids, inplace_backward=True)
        torch.autograd.grad(logq.sum(), logits)
    assert 0 < new.bytes <= 0.03 * logits.nbytes


def test_using_logits_after_an_in_place_backward_raises() -> None:
    """A kernel that writes over the logits spoils them for any second user; here autograd knows."""
    logits = torch.randn(4, 30, requires_grad=True)
    logq, _ = sparse_log_softmax(logits, torch.zeros(4, 1, dtype=torch.long), inplace_backward=True)
    other = (logits**2).sum()
    torch.autograd.grad(logq.sum(), logits, retain_graph=True)
    for outputs in (logq.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_large_vocabulary_are_kept_in_float32(dtype: torch.dtype) -> None:
    """200,000 equal terms: a bf16 sum stops growing at 256, a plain float32 one drifts."""
    logits = torch.full((2, 200_000), 1.5, dtype=dtype)
    _, lse = sparse_log_softmax(logits, torch.zeros(2, 0, dtype=torch.long))
    assert (lse - (1.5 + math.log(200_000))).abs().max() <= 1e-6 * lse[0]


@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 0, 9), (5, 9), (9,), (2, 1, 1, 9)])
@pytest.mark.parametrize("count", [0, 3])
def test_empty_and_odd_shapes(shape: tuple[int, ...], count: int) -> None:
    """No rows, no ids, one row without leading dimensions."""
    assert_agrees(Case(torch.randn(shape), torch.randint(0, 9, (*shape[:-1], count))))


def test_more_ids_than_columns() -> None:
    """K above the vocabulary (or its shard), so that every id repeats."""
    assert_agrees(Case(torch.randn(3, 4), torch.randint(-1, 4, (3, 500))))

"""sparse_log_softmax against the float64 reference, in one process."""

import os
import subprocess
import sys

import pytest
import torch
from agreement import DTYPES, ON_GPU, Case, assert_agrees, assert_gradient, cases
from hypothesis import given, settings

from megatron_pd.ops import sparse_log_softmax


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 7, 15, 16, 31, 32, 33, 1000, 4095, 4096, 4097, 20001])
def test_any_vocabulary_size(dtype: torch.dtype, columns: int) -> None:
    """Whole and partial vector units, one block of the row and several."""
    logits = (torch.randn(3, 2, columns) * 5).to(dtype)
    assert_agrees(Case(logits, torch.randint(-1, columns, (3, 2, 9))))
    ids = torch.randint(-1, columns, (3, 2, 9))
    assert_agrees(Case(logits, ids, second_temperature=2.5), inplace_backward=True)


@pytest.mark.skipif(ON_GPU, reason="of the CPU")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    """The kernels of lesser CPUs; torch's own variable chooses them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "any_vocabulary or special", "-x", "-q"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@given(cases(DTYPES))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_reference(drawn: tuple[Case, bool]) -> None:
    case, inplace_backward = drawn
    assert_agrees(case, inplace_backward=inplace_backward)


@pytest.mark.skipif(ON_GPU, reason="float64 is the CPU's")
def test_gradcheck_in_float64() -> None:
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([4, 0, 10, -1, 4, 7]).expand(2, 3, 6)
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5

    def outputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_log_softmax(logits, ids, temperature=temperature, vocab_size=11)

    assert torch.autograd.gradcheck(outputs, (logits,))


BASE_SHAPE = (6, 4, 50)
VIEWS_IN_PLACE = {
    "every second position": lambda base: base[::2],
    "part of the micro-batch": lambda base: base[:, 1:3],
    "batch first": lambda base: base.transpose(0, 1),
    "part of the columns": lambda base: base[..., 7:40],
    "one column": lambda base: base[..., 3:4],
}
VIEWS_COPIED = {
    "columns not adjacent": lambda base: base.transpose(1, 2),
    "one row many times": lambda base: base[:1].expand(BASE_SHAPE),
    "three strides": lambda base: base.view(3, 2, 2, 2, 50)[:, 1:].transpose(1, 3),
}


@pytest.mark.parametrize("view", [*VIEWS_IN_PLACE, *VIEWS_COPIED])
def test_strided_logits(view: str) -> None:
    """Any strides give the same numbers as contiguous logits."""
    logits = (VIEWS_IN_PLACE | VIEWS_COPIED)[view](torch.randn(BASE_SHAPE))
    ids = torch.randint(-1, logits.shape[-1], (*logits.shape[:-1], 5))
    assert_agrees(Case(logits, ids))


def gradient_in_place(case: Case) -> torch.Tensor:
    logits = case.logits.detach().requires_grad_()
    outputs = sparse_log_softmax(logits, case.ids, inplace_backward=True)
    return torch.autograd.grad(outputs, logits, [case.grad_logq, case.grad_lse])[0]


@pytest.mark.parametrize("view", VIEWS_IN_PLACE)
def test_in_place_gradient_stays_inside_the_view(view: str) -> None:
    """It goes over the view's own elements, and the elements between keep their values."""
    base = torch.randn(BASE_SHAPE)
    before = base.clone()
    logits = VIEWS_IN_PLACE[view](base)
    case = Case(logits, torch.randint(0, logits.shape[-1], (*logits.shape[:-1], 3)))
    _, _, expected = case.reference()
    grad = gradient_in_place(case)
    assert grad.data_ptr() == logits.data_ptr()
    assert_gradient(logits, expected, case.gradient_scale())
    outside = torch.ones_like(base, dtype=torch.bool)
    VIEWS_IN_PLACE[view](outside).fill_(False)
    assert torch.equal(base[outside], before[outside])


@pytest.mark.parametrize("view", VIEWS_COPIED)
def test_in_place_gradient_of_other_strides_is_in_the_copy(view: str) -> None:
    """Rows that can't be written one by one are copied, and then the caller's stay as they are."""
    base = torch.randn(BASE_SHAPE)
    before = base.clone()
    logits = VIEWS_COPIED[view](base)
    case = Case(logits, torch.randint(0, logits.shape[-1], (*logits.shape[:-1], 3)))
    _, _, expected = case.reference()
    assert_gradient(gradient_in_place(case), expected, case.gradient_scale())
    assert torch.equal(base, before)


def test_special_values() -> None:
    """−inf logits get probability 0, NaN and +inf show in the row that holds them and no other."""
    for dtype in DTYPES:
        logits = torch.randn(5, 5000).to(dtype)
        logits[0, ::2] = -torch.inf
        logits[1, 4321] = torch.nan
        logits[2, 17] = torch.inf
        logits[3] = -torch.inf
        ids = torch.tensor([1, 2, 4999, -1]).expand(5, 4)
        logq, lse = sparse_log_softmax(logits, ids)
        expected = logits.double().log_softmax(-1)
        assert logq[0, 1] == -torch.inf
        torch.testing.assert_close(
            logq[:, :3].double(), expected[:, [1, 2, 4999]], rtol=1e-6, atol=1e-6, equal_nan=True
        )
        assert lse[1].isnan() and lse[2].isnan() and lse[3] == -torch.inf
        assert (logq[:, 3] == 0).all()


def test_rows_without_gradient_are_zero_whatever_they_hold() -> None:
    """A loss-masked token's logits may be anything, NaN included, and never reach the gradient."""
    logits = torch.randn(3, 40)
    logits[1] = torch.nan
    logits.requires_grad_()
    logq, lse = sparse_log_softmax(logits, torch.tensor([[3, 5]] * 3))
    keep = torch.tensor([1.0, 0.0, 1.0])
    torch.autograd.backward([logq, lse], [keep[:, None].expand(3, 2), torch.zeros(3)])
    assert torch.equal(logits.grad[1], torch.zeros(40))
    assert logits.grad[0].abs().sum() > 0

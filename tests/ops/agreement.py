"""How close sparse_log_softmax must come to the float64 reference, and on which device.

MEGATRON_PD_TEST_DEVICE=cuda runs all tests of this folder on a GPU, with the checked mode that
reports wrong ids there (tools/gpu_check.py sets both).
"""

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_pd.ops import sparse_log_softmax_reference, sparse_log_softmaxes

FLOAT32_ERROR = 1e-6
DEVICE = os.environ.get("MEGATRON_PD_TEST_DEVICE", "cpu")
ON_GPU = DEVICE != "cpu"
if ON_GPU:
    torch.set_default_device(DEVICE)
# float64 is for checking the formulas, and the CPU's alone.
DTYPES = [torch.float64] * (not ON_GPU) + [torch.float32, torch.bfloat16, torch.float16]


@dataclass(repr=False)
class Case:
    """Inputs of one call, and random gradients for its two outputs.

    With a second temperature both outputs have an axis more, in front.
    """

    logits: Tensor
    ids: Tensor
    temperature: float | Tensor = 1.0
    second_temperature: float | Tensor | None = None
    vocab_size: int | None = None
    grad_logq: Tensor | None = None
    grad_lse: Tensor | None = None

    def __post_init__(self) -> None:
        both = () if self.second_temperature is None else (2,)
        if self.grad_logq is None:
            self.grad_logq = torch.randn((*both, *self.ids.shape))
        if self.grad_lse is None:
            self.grad_lse = torch.randn((*both, *self.ids.shape[:-1]))

    @property
    def temperatures(self) -> list[float | Tensor]:
        second = self.second_temperature
        return [self.temperature] if second is None else [self.temperature, second]

    def stacked(self, outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """logq and lse, with the axis more where there are two of each."""
        logq, lse = (torch.stack(parts) for parts in zip(*outputs, strict=True))
        return (logq[0], lse[0]) if self.second_temperature is None else (logq, lse)

    def gradient_scale(self) -> Tensor:
        """Per row, what the terms of its gradients add up to in size: they may cancel."""
        sizes = self.grad_logq.abs().sum(-1) + self.grad_lse.abs()
        sizes = sizes.unsqueeze(0) if self.second_temperature is None else sizes
        scales = zip(sizes, self.temperatures, strict=True)
        return sum(size / temperature for size, temperature in scales).unsqueeze(-1).double()

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """logq, lse and the logits' gradient in float64."""
        logits = self.logits.detach().double().requires_grad_()
        logq, lse = self.stacked(
            [
                sparse_log_softmax_reference(logits, self.ids, temperature, self.vocab_size)
                for temperature in self.temperatures
            ]
        )
        torch.autograd.backward([logq, lse], [self.grad_logq.double(), self.grad_lse.double()])
        return logq.detach(), lse.detach(), logits.grad

    def outputs(self, logits: Tensor, **options) -> tuple[Tensor, Tensor]:
        """logq and lse of `logits` from sparse_log_softmaxes; `options` are passed on to it."""
        return self.stacked(
            sparse_log_softmaxes(
                logits, self.ids, self.temperatures, vocab_size=self.vocab_size, **options
            )
        )

    def result(self, **options) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference`."""
        logits = self.logits.detach().requires_grad_()
        logq, lse = self.outputs(logits, **options)
        torch.autograd.backward(
            [logq, lse], [self.grad_logq.to(logq.dtype), self.grad_lse.to(lse.dtype)]
        )
        return logq.detach(), lse.detach(), logits.grad


def assert_agrees(case: Case, **options) -> None:
    """Values to 1e-6, gradients to 1e-6 and the rounding to the logits' own type."""
    logits = case.logits.clone()
    expected = case.reference()
    got = case.result(**options)
    assert_values(got[0], expected[0])
    assert_values(got[1], expected[1])
    assert_gradient(got[2], expected[2], case.gradient_scale())
    if not options.get("inplace_backward"):
        assert torch.equal(case.logits, logits), "the logits were changed"


def assert_values(got: Tensor, expected: Tensor) -> None:
    assert got.dtype in (torch.float32, torch.float64)
    error = (got.double() - expected).abs() / expected.abs().clamp(min=1.0)
    tolerance = FLOAT32_ERROR if got.dtype == torch.float32 else 1e-13
    finite = expected.isfinite()
    assert torch.equal(got.double()[~finite], expected[~finite]), "infinities differ"
    assert not (error[finite] > tolerance).any(), f"relative error {error[finite].max():.2e}"


def assert_gradient(got: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Each element may be off by half a unit in the last place of its own type, and by 1e-6 of
    its row's `scale`, where it came from a sum in float32."""
    assert got.shape == expected.shape
    info = torch.finfo(got.dtype)
    sums = 1e-12 if got.dtype == torch.float64 else FLOAT32_ERROR
    allowed = expected.abs() * info.eps / 2 + scale * sums + info.smallest_normal * info.eps
    excess = (got.double() - expected).abs() / allowed
    assert not (excess > 1).any(), f"error is {excess.max():.2f} of what is allowed"
    assert not got.isnan().any()


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> tuple[Case, bool]:
    """Any shape, ids, temperature and padding, and whether the gradient is written in place."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    leading = draw(st.lists(st.integers(0, 4), max_size=3), label="leading")
    columns = draw(st.integers(1, 300), label="columns")
    vocab_size = draw(st.none() | st.integers(1, columns), label="vocab_size")
    count = draw(st.integers(0, 12), label="K")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    scale = draw(st.sampled_from([0.0, 1.0, 10.0, 100.0]), label="scale")
    id_dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="id dtype")
    repeated = draw(st.booleans(), label="few distinct ids")
    limit = vocab_size or columns
    ids = torch.randint(-1, min(limit, 2) if repeated else limit, (*leading, count), dtype=id_dtype)
    temperature = draw(st.sampled_from([1.0, 0.5, 2.0, "per row", "per position"]), label="τ")
    if temperature == "per row":
        temperature = torch.rand(leading) + 0.5
    elif temperature == "per position":
        temperature = torch.rand(leading[-1:]) + 0.5
    second = draw(st.sampled_from([None, 1.0, 3.0, "per row"]), label="second τ")
    if second == "per row":
        second = torch.rand(leading) + 0.5
    logits = (torch.randn(*leading, columns) * scale).to(dtype)
    case = Case(logits, ids, temperature, second, vocab_size)
    return case, draw(st.booleans(), label="in place")

"""The registered operators: schemas, fake kernels, torch.compile, torch.export, error messages."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_pd.megatron import cpu
from megatron_pd.ops import sparse_log_softmax, sparse_log_softmaxes
from megatron_pd.ops.library import has_cuda_kernels, operators

# The module, whose name in the package is taken by its function.
MODULE = sys.modules["megatron_pd.ops.sparse_log_softmax"]

ARGUMENTS = {
    "[s, b, V], one temperature": ((3, 2, 40), 4, (1, 1)),
    "one temperature per row": ((1, 5, 33), 3, (5, 1)),
    "two temperatures": ((3, 2, 40), 4, (1, 2)),
    "two temperatures per row": ((1, 5, 33), 3, (5, 2)),
    "no ids": ((2, 2, 8), 0, (1, 1)),
    "no rows": ((0, 2, 8), 2, (1, 1)),
}


def forward_arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    shape, count, temperatures = ARGUMENTS[name]
    ids = torch.randint(-1, shape[-1], (shape[0] * shape[1], count))
    return torch.randn(shape).to(dtype), ids, torch.rand(temperatures) + 0.5, 0, shape[-1]


def backward_arguments(name: str) -> tuple:
    logits, ids, temperature, first_id, vocab_size = forward_arguments(name)
    statistics = operators.sparse_log_softmax_forward(*forward_arguments(name))
    each = temperature.shape[1]
    gradients = torch.randn(len(ids), each, ids.shape[1]), torch.randn(len(ids), each)
    return logits, ids, temperature, *statistics, *gradients, first_id, vocab_size


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str) -> None:
    """Schemas say the truth about mutation, and fake kernels give the real shapes and strides."""
    torch.library.opcheck(operators.sparse_log_softmax_forward, forward_arguments(name))
    torch.library.opcheck(
        operators.sparse_log_softmax_forward, forward_arguments(name, torch.bfloat16)
    )
    torch.library.opcheck(operators.sparse_log_softmax_backward, backward_arguments(name))
    torch.library.opcheck(operators.sparse_log_softmax_backward_, backward_arguments(name))


def loss(hidden: Tensor, weight: Tensor, ids: Tensor, inplace_backward: bool) -> Tensor:
    logits = hidden @ weight
    logq, lse = sparse_log_softmax(logits, ids, temperature=1.5, inplace_backward=inplace_backward)
    return logq.mul(torch.arange(ids.shape[-1])).sum() + lse.square().sum()


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_torch_compile_traces_through(inplace_backward: bool) -> None:
    """One graph forward and backward, numbers as in eager mode, any number of rows."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.randn(8, 40, requires_grad=True)
    for rows in (6, 7):
        ids = torch.randint(-1, 40, (rows, 2, 5))
        hidden = torch.randn(rows, 2, 8)
        expected = loss(hidden, weight, ids, inplace_backward)
        got = compiled(hidden, weight, ids, inplace_backward)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, weight), torch.autograd.grad(expected, weight)
        )


def test_torch_export_traces_through() -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return sparse_log_softmax(logits, ids, temperature=2.0)

    logits, ids = torch.randn(6, 40), torch.randint(0, 40, (6, 5))
    rows = torch.export.Dim("rows", min=2)
    shapes = {"logits": {0: rows}, "ids": {0: rows}}
    program = torch.export.export(Loss(), (logits, ids), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("megatron_pd.sparse_log_softmax_forward" in target for target in targets)
    logits, ids = torch.randn(9, 40), torch.randint(0, 40, (9, 5))
    torch.testing.assert_close(program.module()(logits, ids), Loss()(logits, ids))


@pytest.mark.parametrize("count", [0, 3])
def test_there_are_one_or_two_temperatures(count: int) -> None:
    with pytest.raises(ValueError, match=f"There are {count} temperatures; expected 1 to 2"):
        sparse_log_softmaxes(torch.zeros(2, 9), torch.zeros(2, 1, dtype=torch.int), [1.0] * count)


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    logq, _ = sparse_log_softmax(logits, torch.zeros(2, 1, dtype=torch.long))
    (grad,) = torch.autograd.grad(logq.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


LOGITS = torch.zeros(3, 10)
IDS = torch.zeros(3, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(ids=IDS + 10),
            IndexError,
            r"ids\[0, 0\] is 10: expected -1 \(padding\) or .* 0 to 9",
        ),
        (dict(ids=IDS - 2), IndexError, r"ids\[0, 0\] is -2"),
        (dict(ids=IDS + 2**32), IndexError, r"is 4294967296"),
        (dict(ids=IDS + 8, vocab_size=8), IndexError, r"from 0 to 7"),
        (dict(ids=IDS[:2]), ValueError, r"same leading dimensions; got \(3, 10\) and \(2, 2\)"),
        (dict(ids=IDS[0]), ValueError, r"same leading dimensions"),
        (dict(logits=torch.tensor(1.0)), ValueError, r"logits must be \[..., V\]"),
        (dict(ids=IDS.short()), TypeError, r"int32 or int64; got torch.int16"),
        (dict(logits=LOGITS.int()), TypeError, r"float16; got torch.int32"),
        (dict(ids=IDS.to("meta")), ValueError, r"ids are on meta but the logits are on (cpu|cuda)"),
        (dict(temperature=0.0), ValueError, r"temperature must be positive; got 0.0"),
        (dict(temperature=-1.0), ValueError, r"temperature must be positive; got -1.0"),
        (dict(temperature=torch.ones(4)), ValueError, r"shape \(4,\), which doesn't broadcast"),
        (dict(temperature=torch.zeros(3)), ValueError, r"temperature must be positive.*got 0"),
        (dict(vocab_size=11), ValueError, r"between 1 and the logits' 10 ids.*got 11"),
        (dict(vocab_size=0), ValueError, r"vocab_size .* got 0"),
    ],
)
def test_mistakes_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse_log_softmax(**(dict(logits=LOGITS, ids=IDS) | arguments))


@pytest.mark.skipif(not has_cuda_kernels(), reason="built without CUDA kernels: no nvcc")
def test_on_a_gpu_nothing_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass without its kernel, on fake CUDA tensors. A fake tensor has no values: to
    look at one, which would wait for the GPU, is an error."""
    if cpu.is_cpu():
        pytest.skip("an earlier test of this process has made CUDA mean the CPU")
    monkeypatch.setattr(MODULE, "_CHECK_ON_GPU", False)
    with FakeTensorMode():
        logits = torch.empty(4, 2, 30, device="cuda", dtype=torch.bfloat16)
        ids = torch.empty(4, 2, 3, device="cuda", dtype=torch.int32)
        temperature = torch.ones(4, 2, device="cuda")
        for tau in (2.0, temperature, temperature.cpu()):
            logq, lse = sparse_log_softmax(logits, ids, temperature=tau, vocab_size=29)
            assert logq.device.type == lse.device.type == "cuda"
            assert logq.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize(("last_id", "temperature"), [(-2, 1.0), (10, 1.0), (0, 0.0), (0, 1.0)])
def test_checked_mode_finds_what_the_cpu_kernels_find(last_id: int, temperature: float) -> None:
    """The checks that MEGATRON_PD_CHECK_INPUTS=1 adds on a GPU, on the tensors it hands them."""
    ids, temperatures = torch.tensor([[3, -1], [9, last_id]]), torch.tensor([1.0, temperature])

    def message(check: Callable[[], object]) -> str:
        try:
            check()
        except (IndexError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    checked = message(lambda: MODULE._check_values(ids, temperatures, 10))
    assert checked == message(
        lambda: sparse_log_softmax(torch.zeros(2, 10), ids, temperature=temperatures)
    )


def test_unbuilt_extension_says_how_to_build_it() -> None:
    """An import without the compiled library is an error, not a slow substitute."""
    script = (
        "import pathlib; exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda path: '.so' not in path.name and exists(path)\n"
        "import megatron_pd.ops"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: The compiled operators of megatron_pd aren't built" in done.stderr
    assert "make build" in done.stderr

"""The CUDA kernels, run by the emulator: values, gradients, alignment, order, addresses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from agreement import Case, assert_agrees, cases
from emulated import (
    LOGIT_TYPES,
    SANITIZERS,
    EmulatedOperators,
    compile_kernels,
    emulator_library,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_cases import RowCase, row_cases

from megatron_pd.distill.objective import distillation_loss
from megatron_pd.ops import sparse_log_softmax

# The modules, whose names in the package are taken by their functions.
MODULE = sys.modules["megatron_pd.ops.sparse_log_softmax"]
ROW_MODULE = sys.modules["megatron_pd.ops.row_divergence"]
DTYPES = list(LOGIT_TYPES)
SANITIZED = "MEGATRON_PD_EMULATOR" in os.environ
# Columns that take the emulator's 64 threads once through the loop over batches of vectors.
BATCH = {dtype: 64 * 4 * 16 // dtype.itemsize for dtype in DTYPES}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(MODULE, "operators", EmulatedOperators())
    monkeypatch.setattr(ROW_MODULE, "operators", EmulatedOperators())
    print(f"torch.manual_seed({torch.seed()})")
    yield


@given(cases(DTYPES), st.integers(1, 5), st.booleans(), st.integers(0, 8))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_agrees_with_the_reference(
    drawn: tuple[Case, bool], parts: int, reversed: bool, gradient_offset: int
) -> None:
    """As on the CPU, with any number of blocks per row, in either order of blocks and threads,
    wherever the gradient's memory begins."""
    case, inplace_backward = drawn
    MODULE.operators = EmulatedOperators(
        parts=parts, reversed=reversed, gradient_offset=gradient_offset
    )
    assert_agrees(case, inplace_backward=inplace_backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_long_rows_of_any_alignment(dtype: torch.dtype, inplace_backward: bool, parts: int) -> None:
    """Batches of vectors, single vectors and single elements before and after them."""
    MODULE.operators = EmulatedOperators(parts=parts)
    for offset in range(0, 16 // dtype.itemsize, 3):
        for extra in (0, 1, 7, 64 * 16 // dtype.itemsize + 5):
            base = (torch.randn(3, 2 * BATCH[dtype] + 40 + extra) * 4).to(dtype)
            logits = base[:, offset:]
            ids = torch.randint(-1, logits.shape[1], (3, 80))
            second = 2.0 if extra == 1 else None
            case = Case(logits, ids, second_temperature=second)
            assert_agrees(case, inplace_backward=inplace_backward)


@pytest.mark.parametrize("first_id", [0, 100, 200])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("each", [1, 2])
def test_shards_agree_with_the_cpu_operators(first_id: int, parts: int, each: int) -> None:
    """Statistics and gradients of 100 columns of a vocabulary of 150: a whole shard, one that is
    half padding, one of padding alone; ids are of the whole vocabulary."""
    cpu, cuda = torch.ops.megatron_pd, EmulatedOperators(parts=parts)
    logits, ids = torch.randn(4, 2, 100), torch.randint(-1, 150, (8, 20))
    temperature = torch.rand(8, each) + 0.5
    arguments = (logits, ids, temperature, first_id, 150)
    expected = cpu.sparse_log_softmax_forward(*arguments)
    torch.testing.assert_close(cuda.sparse_log_softmax_forward(*arguments), expected)
    # As if reduced over all shards: the maximum may be another shard's.
    maximum = logits.flatten(0, 1).amax(-1) + torch.rand(8)
    statistics = maximum, torch.rand(8, each + 20) + 0.5
    gradients = torch.randn(8, each, 20), torch.randn(8, each)
    arguments = (logits, ids, temperature, *statistics, *gradients, first_id, 150)
    # The two exponentials round exponents of up to 20 on their own, at 1e-6 of their value each.
    torch.testing.assert_close(
        cuda.sparse_log_softmax_backward(*arguments),
        cpu.sparse_log_softmax_backward(*arguments),
        rtol=4e-6,
        atol=1e-5,
    )


def test_strided_rows_and_repeated_ids() -> None:
    base = torch.randn(4, 3, 500).bfloat16()
    for logits in (base.transpose(0, 1), base[::2], base[:, 1:]):
        assert_agrees(Case(logits, torch.randint(0, 5, (*logits.shape[:-1], 70))))


def test_special_values() -> None:
    """−inf, +inf and NaN stay in their rows, and a row without gradient isn't read."""
    logits = torch.randn(6, 3000)
    logits[0, ::2] = -torch.inf
    logits[1, 2222] = torch.nan
    logits[2, 17] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    logits.requires_grad_()
    logq, lse = sparse_log_softmax(logits, torch.tensor([[1, 2, 2999, -1]] * 6))
    expected = logits.detach().double().log_softmax(-1)[:, [1, 2, 2999]]
    torch.testing.assert_close(logq[:, :3].double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert lse[[1, 2, 4]].isnan().all() and lse[3] == -torch.inf
    keep = torch.tensor([1.0, 0, 0, 0, 0, 1])
    torch.autograd.backward([logq, lse], [keep[:, None].expand(6, 4), torch.zeros(6)])
    assert torch.equal(logits.grad[1:5], torch.zeros(4, 3000))
    assert logits.grad[[0, 5]].isfinite().all()


@pytest.mark.parametrize("wrong", [-2, 50, 2**32 + 1])
def test_an_unknown_id_gives_nan(wrong: int) -> None:
    """A kernel can't raise, but a wrong id must not pass for a token of another shard."""
    ids = torch.tensor([[3, wrong, -1]])
    logq, lse = sparse_log_softmax(torch.randn(1, 50), ids)
    assert logq[0, 1].isnan() and logq[0, 0].isfinite() and lse.isfinite().all()


def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 elements apart (of memory that is never touched in between)."""
    wide = torch.empty(2**31 + 100, dtype=torch.bfloat16)
    logits = torch.as_strided(wide, (2, 64), (2**31 + 8, 1))
    logits.normal_()
    case = Case(logits, torch.randint(0, 64, (2, 5)))
    assert_agrees(Case(logits.clone(), case.ids))
    expected = case.reference()
    got = case.result(inplace_backward=True)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected[2], rtol=1e-2, atol=1e-6)


@given(row_cases(), st.booleans())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_row_divergence_agrees_with_the_cpu_operator(case: RowCase, reversed: bool) -> None:
    """A warp's lanes share out what one thread does there, in the same code."""

    def solve(operators: object) -> tuple[torch.Tensor, torch.Tensor]:
        ROW_MODULE.operators = operators
        log_q = case.log_q_TK.float().requires_grad_()
        label_log_q = case.label_log_q_T.float().requires_grad_()
        loss = distillation_loss(case.config, case.teacher, log_q, label_log_q, case.labels_T)
        loss.sum().backward()
        return loss.detach(), log_q.grad, label_log_q.grad

    expected = solve(torch.ops.megatron_pd)
    got = solve(EmulatedOperators(reversed=reversed))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_conversions_of_the_emulator(dtype: torch.dtype) -> None:
    """All 65,536 numbers one way, random and border cases the other, against torch."""
    library = emulator_library()
    bits = torch.arange(2**16, dtype=torch.int32)
    values = bits.to(torch.uint16).view(dtype)
    widened = torch.tensor([library.emulate_widen(LOGIT_TYPES[dtype], int(b)) for b in bits])
    torch.testing.assert_close(widened, values.float(), rtol=0, atol=0, equal_nan=True)
    border = values.float()[values.isfinite()]
    halfway = (border[1:] + border[:-1]) / 2
    floats = torch.cat([halfway[::17], torch.randn(2000) * 1e-6, torch.randn(2000)])
    narrowed = [library.emulate_narrow(LOGIT_TYPES[dtype], float(x)) for x in floats]
    assert torch.equal(
        torch.tensor(narrowed, dtype=torch.int32).to(torch.uint16).view(dtype), floats.to(dtype)
    )


@pytest.mark.parametrize("mistake", [0, 1])
def test_the_emulator_sees_divergent_barriers(mistake: int) -> None:
    script = f"import emulated; emulated.emulator_library().emulate_mistake({mistake})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )
    assert "a barrier or shuffle that not all threads reach" in done.stderr


def test_the_emulator_shows_races() -> None:
    library = emulator_library()
    assert library.emulate_race(False) != library.emulate_race(True)


@pytest.fixture(scope="module")
def sanitized_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sanitized") / "emulated_kernels.so"
    compile_kernels(target, *SANITIZERS)
    return target


def run_sanitized(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python process with the sanitizers' runtimes, on kernels compiled for them."""
    runtime = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "MEGATRON_PD_EMULATOR": str(library),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python doesn't free all at its end
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_under_address_and_undefined_behaviour_sanitizers(sanitized_library: Path) -> None:
    tests = "reference or alignment or shards or strided or special or unknown or divergence"
    done = run_sanitized(sanitized_library, "-m", "pytest", "-x", __file__, "-k", tests)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_the_sanitizer_sees_a_read_beyond_the_logits(sanitized_library: Path) -> None:
    script = (
        "import torch; from emulated import EmulatedOperators\n"
        "logits, ids = torch.randn(2, 1, 64), torch.zeros(3, 1, dtype=torch.long)\n"
        "EmulatedOperators().sparse_log_softmax_forward(logits, ids, torch.ones(1, 1), 0, 64)"
    )
    done = run_sanitized(sanitized_library, "-c", script)
    assert "heap-buffer-overflow" in done.stderr and "READ of size 16" in done.stderr

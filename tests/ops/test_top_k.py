"""The top k logits of rows against a stable sort, with ties, padding, −inf and NaN."""

import os
import subprocess
import sys

import pytest
import torch
from agreement import DTYPES, ON_GPU

from megatron_pd.ops import top_k
from megatron_pd.ops.library import operators


def reference(
    logits: torch.Tensor, k: int, first_id: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    own = logits[..., : max(0, vocab_size - first_id)].double()
    own = own.masked_fill(own.isnan(), -torch.inf)
    values, ids = own.sort(dim=-1, descending=True, stable=True)  # of equals the lower id first
    missing = max(0, k - own.shape[-1])
    values = torch.nn.functional.pad(values[..., :k], (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(ids[..., :k] + first_id, (0, missing), value=-1)
    return values, ids.masked_fill(values == -torch.inf, -1).int()


def check(logits: torch.Tensor, k: int, first_id: int = 0, vocab_size: int | None = None) -> None:
    vocab_size = first_id + logits.shape[-1] if vocab_size is None else vocab_size
    values, ids = top_k(logits, k, first_id=first_id, vocab_size=vocab_size)
    expected_values, expected_ids = reference(logits, k, first_id, vocab_size)
    assert values.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert ids.dtype == torch.int32
    assert torch.equal(values.double(), expected_values)
    if not ON_GPU:
        assert torch.equal(ids, expected_ids)
    there = ids >= 0
    own = logits.double().gather(-1, (ids.long() - first_id).clamp(min=0))
    assert torch.equal(there, expected_ids >= 0) and torch.equal(own[there], values.double()[there])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size(dtype: torch.dtype) -> None:
    for columns in (1, 2, 15, 31, 32, 33, 64, 100, 1000, 4096, 4097, 20001):
        for k in (1, 3, 50, 200):
            check((torch.randn(3, 2, columns) * 5).to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype: torch.dtype) -> None:
    logits = torch.randn(10, 700)
    logits[0] = 0  # nothing but ties
    logits[1] = torch.randint(3, (700,))
    logits[2] = -torch.inf
    logits[3, 5:] = -torch.inf
    logits[4, ::3] = torch.nan
    logits[5] = torch.nan
    logits[6] = torch.arange(700)
    logits[7] = -torch.arange(700)
    logits[8, 100:110] = torch.inf
    logits[9, torch.randperm(700)[:60]] = 7  # ties at the k-th place
    for k in (1, 8, 50):
        check(logits.to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_and_padding(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4 * 96).to(dtype)
    for vocab_size in (1, 95, 96, 97, 250, 4 * 96):
        for rank, shard in enumerate(logits.split(96, -1)):
            check(shard, 12, rank * 96, vocab_size)


def test_rows_are_read_where_they_lie() -> None:
    logits = torch.randn(6, 4, 300)
    for view in (logits.transpose(0, 1), logits[::2], logits[:, 1:3], logits[..., :200], logits[0]):
        check(view, 9)
    check(logits[:0], 9)


@pytest.mark.skipif(ON_GPU, reason="of the CPU")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "size or special", "-x", "-q"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(ON_GPU, reason="the operator is the CPU's")
def test_opcheck() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(operators.top_k, (torch.randn(2, 3, 70).to(dtype), 5, 0, 66))


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        top_k(torch.randn(2, 5), 0, first_id=0, vocab_size=5)

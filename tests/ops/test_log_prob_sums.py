"""Sums over rows of log-probs against float64, with padding, −inf, and log-probs far from 0."""

import os
import subprocess
import sys

import pytest
import torch
from agreement import DEVICE, DTYPES, ON_GPU

from megatron_pd.ops import log_prob_sums
from megatron_pd.ops.library import operators


def check(logits: torch.Tensor, first_id: int = 0, vocab_size: int | None = None) -> None:
    """Means and variance to float32's rounding, however far from 0 the log-probs are."""
    vocab_size = first_id + logits.shape[-1] if vocab_size is None else vocab_size
    logits = logits.to(DEVICE)
    exact = logits[..., : max(0, vocab_size - first_id)].double()
    lse = exact.logsumexp(-1) + 0.5  # as if other shards had more
    lse = lse.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    sums = log_prob_sums(logits, lse, first_id=first_id, vocab_size=vocab_size)
    assert sums.dtype == torch.float64 and sums.shape == (*logits.shape[:-1], 3)
    logp = exact - lse.unsqueeze(-1).double()
    plogp = torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1)
    torch.testing.assert_close(sums[..., 0], plogp, rtol=1e-5, atol=1e-6)
    count = max(1, exact.shape[-1])
    mean, expected_mean = sums[..., 1] / count, logp.sum(-1) / count
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-6)
    variance, expected = (
        (squares / count - mean**2).clamp(min=0)
        for squares, mean in ((sums[..., 2], mean), ((logp**2).sum(-1), expected_mean))
    )
    torch.testing.assert_close(variance, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size(dtype: torch.dtype) -> None:
    for columns in (1, 2, 15, 31, 32, 33, 64, 100, 1000, 4096, 4097, 20001):
        check((torch.randn(3, 2, columns) * 5).to(dtype))


@pytest.mark.skipif(ON_GPU, reason="of the CPU's sums, which are of blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_that_hardly_differ(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 20_000) / 100
    logits[:, 0] = 300  # all others are at −300
    check(logits.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_and_padding(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4 * 96).to(dtype)
    for vocab_size in (1, 95, 96, 97, 250, 4 * 96):
        for rank, shard in enumerate(logits.split(96, -1)):
            check(shard, rank * 96, vocab_size)


def test_a_token_that_cannot_be() -> None:
    logits = torch.randn(2, 9000, device=DEVICE)
    logits[0, 17] = logits[1, 8999] = -torch.inf
    sums = log_prob_sums(logits, logits.logsumexp(-1), first_id=0, vocab_size=9000)
    assert sums[:, 0].isfinite().all()
    assert (sums[:, 1] == -torch.inf).all() and (sums[:, 2] == torch.inf).all()


def test_rows_are_read_where_they_lie() -> None:
    logits = torch.randn(6, 4, 300)
    for view in (logits.transpose(0, 1), logits[::2], logits[:, 1:3], logits[..., :200], logits[0]):
        check(view)
    check(logits[:0])


@pytest.mark.skipif(ON_GPU, reason="of the CPU")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "size or differ or cannot", "-x", "-q"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(ON_GPU, reason="the operator is the CPU's")
def test_opcheck() -> None:
    for dtype in DTYPES:
        logits = torch.randn(2, 3, 70).to(dtype)
        lse = torch.randn(6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        torch.library.opcheck(operators.log_prob_sums, (logits, lse, 0, 66))

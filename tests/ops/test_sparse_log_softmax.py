"""sparse_log_softmax against the float64 reference, one process."""

import pytest
import torch

from megatron_pd.ops import sparse_log_softmax, sparse_log_softmax_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 31, 33, 1000, 9001])
def test_values_and_gradient_match_the_reference(dtype: torch.dtype, columns: int) -> None:
    logits = (torch.randn(3, 2, columns) * 5).to(dtype).requires_grad_()
    ids = torch.randint(-1, columns, (3, 2, 9))
    weight_K, weight = torch.randn(3, 2, 9), torch.randn(3, 2)
    exact = logits.detach().double().requires_grad_()
    logq, lse = sparse_log_softmax(logits, ids, temperature=1.7)
    logq_ref, lse_ref = sparse_log_softmax_reference(exact, ids, 1.7)
    ((logq * weight_K).sum() + (lse * weight).sum()).backward()
    ((logq_ref * weight_K).sum() + (lse_ref * weight).sum()).backward()
    torch.testing.assert_close(logq.double(), logq_ref, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(lse.double(), lse_ref, rtol=1e-6, atol=3e-6)
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    error = (logits.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < rounding

"""Teacher rows from sharded logits at 1, 2 and 4 real ranks against the dense distribution, in
float64, of exactly the logits that were given."""

import itertools
import secrets
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pd.distill.targets import TeacherTargets, rows_of_draws
from megatron_pd.teacher.capture import CapturedRows, capture_rows

RANKS = 4
PADDED = 32
VOCABULARIES = (21, 13)  # ranks whose columns are partly or all padding
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPE = 7, 100
TOKENS = 700  # more than one chunk
TOP_P, TOP_K = 0.9, 6


def check_nuclei(group: dist.ProcessGroup, own, vocab_size, logits_TV, labels_T) -> None:
    """Of logits [B, L, V] that lie in memory as [L, B, V], as Megatron's do."""
    logits_LBV = logits_TV[:, own].unflatten(0, SHAPE).transpose(0, 1).contiguous()
    found = capture_rows(
        logits_LBV.transpose(0, 1),
        labels_T.view(SHAPE),
        top_p=TOP_P,
        top_k=TOP_K,
        vocab_size=vocab_size,
        tp_group=group,
        statistics=True,
    )
    assert found.lse.shape == SHAPE
    targets = TeacherTargets(*(values.flatten(0, 1) for values in vars(found.targets).values()))
    found = CapturedRows(targets, found.label_logprob.flatten(), found.lse.flatten())
    dense_TV = logits_TV[:, :vocab_size].double()
    logprobs_TV = dense_TV.log_softmax(-1)
    rows = found.targets
    # Of equal logits, as 16 bits have many, either may be in the row: its values are the same.
    kept_TK = torch.arange(TOP_K) < rows.counts[:, None]
    assert (rows.ids[~kept_TK] == -1).all() and (rows.logprobs[~kept_TK] == 0).all()
    for ids, count in zip(rows.ids.tolist(), rows.counts.tolist(), strict=True):
        assert len(set(ids[:count])) == count
    own_TK = logprobs_TV.gather(1, rows.ids.long().clamp(min=0))
    top_TV = logprobs_TV.sort(descending=True).values
    for expected_TK in (own_TK, top_TV[:, :TOP_K]):
        expected_TK = torch.where(kept_TK, expected_TK, 0.0)
        torch.testing.assert_close(rows.logprobs.double(), expected_TK, rtol=1e-5, atol=1e-5)
    mass_TV = top_TV.exp().cumsum(-1)
    sure_T = (mass_TV - TOP_P).abs().amin(-1) > 1e-6  # else rounding decides
    expected_T = ((mass_TV < TOP_P).sum(-1) + 1).clamp(max=TOP_K)
    assert sure_T.float().mean() > 0.9
    assert torch.equal(rows.counts[sure_T].long(), expected_T[sure_T])
    for column, exact in (
        (found.label_logprob, logprobs_TV.gather(1, labels_T[:, None]).squeeze(1)),
        (found.lse, dense_TV.logsumexp(-1)),
        (rows.entropy, -(logprobs_TV.exp() * logprobs_TV).sum(-1)),
        (rows.std, dense_TV.std(-1, correction=0)),
    ):
        assert column.dtype == torch.float32
        torch.testing.assert_close(column.double(), exact, rtol=1e-5, atol=1e-5)


def check_draws(
    group: dist.ProcessGroup, own, vocab_size, logits_TV, labels_T, uniforms_TN
) -> None:
    """The ids that inverting the dense cumulative distribution gives."""
    found = capture_rows(
        logits_TV[:, own], labels_T, uniforms=uniforms_TN, vocab_size=vocab_size, tp_group=group
    ).targets
    cumulative_TV = logits_TV[:, :vocab_size].double().softmax(-1).cumsum(-1)
    # Rounding may move a draw that falls within it of a boundary; such a row proves nothing.
    gap_T = (uniforms_TN.unsqueeze(-1) - cumulative_TV.unsqueeze(1)).abs().amin((1, 2))
    sure_T = gap_T > 1e-6
    assert sure_T.float().mean() > 0.9
    expected = rows_of_draws(torch.searchsorted(cumulative_TV, uniforms_TN, right=True))
    assert torch.equal(found.ids[sure_T], expected.ids[sure_T])
    assert torch.equal(found.logprobs[sure_T], expected.logprobs[sure_T])


def check_unbiased(
    group: dist.ProcessGroup, own, vocab_size, logits_TV, labels_T, uniforms_TN
) -> None:
    """Over many draws from one distribution, each token's share is its probability."""
    same_TV = logits_TV[:1].expand(TOKENS, -1)
    rows = capture_rows(
        same_TV[:, own], labels_T, uniforms=uniforms_TN, vocab_size=vocab_size, tp_group=group
    ).targets
    shares_TV = torch.zeros(TOKENS, vocab_size, dtype=torch.float64).scatter_add_(
        1,
        rows.ids.long().clamp(min=0),
        torch.where(rows.mask, rows.logprobs.double().exp(), 0.0),
    )
    torch.testing.assert_close(shares_TV.sum(-1), torch.ones(TOKENS).double())
    p_V = logits_TV[0, :vocab_size].double().softmax(-1)
    standard_error_V = (p_V * (1 - p_V) / uniforms_TN.numel()).sqrt()
    assert ((shares_TV.mean(0) - p_V).abs() < 6 * standard_error_V).all()


def run_rank(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    for size in (1, 2, RANKS):
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, RANKS, size)]
        group = groups[rank // size]
        width = PADDED // size
        own = slice(group.rank() * width, (group.rank() + 1) * width)
        for vocab_size, dtype in itertools.product(VOCABULARIES, DTYPES):
            torch.manual_seed(seed)
            logits_TV = (torch.randn(TOKENS, PADDED) * 2).to(dtype)
            labels_T = torch.randint(0, vocab_size, (TOKENS,))
            uniforms_TN = torch.rand(TOKENS, 12, dtype=torch.float64)
            case = (group, own, vocab_size, logits_TV, labels_T)
            check_nuclei(*case)
            if dtype in (torch.float32, torch.bfloat16):
                check_draws(*case, uniforms_TN)
                check_unbiased(*case, uniforms_TN)
    dist.destroy_process_group()


def test_rows_at_1_2_and_4_ranks(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    mp.spawn(run_rank, (str(tmp_path), seed), nprocs=RANKS)


class LargestNew(TorchDispatchMode):
    """Elements of the largest tensor that operators return and that is no view of `logits`."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._own = logits.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() != self._own:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_logits_are_not_copied(dtype: torch.dtype) -> None:
    """Neither their layout, [L, B, V] as Megatron has it, nor their type is changed."""
    logits_BLV = torch.randn(16, 3, 50_000).to(dtype).transpose(0, 1)
    with LargestNew(logits_BLV) as new:
        capture_rows(logits_BLV, torch.zeros(3, 16).long(), top_p=0.9, top_k=50, vocab_size=49_900)
    assert 0 < new.elements <= 48 * 51

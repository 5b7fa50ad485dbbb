"""Teacher rows from sharded logits at 1 and 2 real ranks against the dense distribution."""

import secrets
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_pd.distill.targets import rows_of_draws, top_p_k
from megatron_pd.teacher.capture import capture_rows

RANKS = 2
PADDED = 32
VOCABULARIES = (21, 13)  # the second rank's 16 columns hold 5 tokens, or nothing but padding
TOKENS = 700  # more than one chunk


def check_nuclei(group: dist.ProcessGroup, own, vocab_size, logits_TV, labels_T) -> None:
    found = capture_rows(
        logits_TV[:, own],
        labels_T,
        top_p=0.9,
        top_k=6,
        vocab_size=vocab_size,
        tp_group=group,
        statistics=True,
    )
    dense_TV = logits_TV[:, :vocab_size].double()
    logprobs_TV = dense_TV.log_softmax(-1)
    expected = top_p_k(dense_TV, 0.9, 6)
    assert torch.equal(found.targets.counts, expected.counts)
    assert torch.equal(found.targets.ids, expected.ids)
    torch.testing.assert_close(found.targets.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    for column, exact in (
        (found.label_logprob, logprobs_TV.gather(1, labels_T[:, None]).squeeze(1)),
        (found.targets.entropy, -(logprobs_TV.exp() * logprobs_TV).sum(-1)),
        (found.targets.std, dense_TV.std(-1, correction=0)),
    ):
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
    for size in (1, RANKS):
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, RANKS, size)]
        group = groups[rank // size]
        width = PADDED // size
        own = slice(group.rank() * width, (group.rank() + 1) * width)
        for vocab_size in VOCABULARIES:
            torch.manual_seed(seed)
            logits_TV = torch.randn(TOKENS, PADDED) * 2
            labels_T = torch.randint(0, vocab_size, (TOKENS,))
            uniforms_TN = torch.rand(TOKENS, 12, dtype=torch.float64)
            case = (group, own, vocab_size, logits_TV, labels_T)
            check_nuclei(*case)
            check_draws(*case, uniforms_TN)
            check_unbiased(*case, uniforms_TN)
    dist.destroy_process_group()


def test_rows_at_1_and_2_ranks(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    mp.spawn(run_rank, (str(tmp_path), seed), nprocs=RANKS)

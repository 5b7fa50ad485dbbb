"""sparse_log_softmax on vocabulary shards: values and gradients at 1, 2 and 4 real ranks (gloo).

Each rank compares its own shard with the float64 reference of the whole vocabulary. A loss whose
values agree between ranks says nothing about its gradient, so every case checks both.
"""

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from agreement import FLOAT32_ERROR, ON_GPU, Case, assert_gradient, assert_values
from torch import Tensor

from megatron_pd.ops import sparse_log_softmax

RANKS = 4


def assert_shards_agree(case: Case, group: dist.ProcessGroup, inplace_backward: bool) -> None:
    """The whole of `case` in float64 against this rank's shard of it."""
    logq_ref, lse_ref, grad_ref = case.reference()
    columns = case.logits.shape[-1] // group.size()
    shard = slice(group.rank() * columns, (group.rank() + 1) * columns)
    logits = case.logits[..., shard].clone().requires_grad_()
    logq, lse = case.outputs(logits, tp_group=group, inplace_backward=inplace_backward)
    assert_values(logq.detach(), logq_ref)
    assert_values(lse.detach(), lse_ref)
    (grad,) = torch.autograd.grad(
        [logq, lse], logits, [case.grad_logq.to(logq.dtype), case.grad_lse.to(lse.dtype)]
    )
    assert_gradient(grad, grad_ref[..., shard], case.gradient_scale())


def plain(columns: int, dtype: torch.dtype) -> Case:
    logits = (torch.randn(3, 2, columns) * 5).to(dtype)
    return Case(logits, torch.randint(-1, columns, (3, 2, 9)), torch.rand(3, 2) + 0.5)


def two_temperatures(dtype: torch.dtype) -> Case:
    logits = (torch.randn(3, 2, 4 * 1001) * 5).to(dtype)
    return Case(logits, torch.randint(-1, 4 * 1001, (3, 2, 9)), 1.0, torch.rand(3, 2) + 1.5)


def all_ids_on_the_last_rank() -> Case:
    return Case(torch.randn(4, 64), torch.randint(48, 64, (4, 7)))


def more_ids_than_a_shard_has() -> Case:
    return Case(torch.randn(4, 8), torch.randint(0, 8, (4, 100), dtype=torch.int32))


def a_shard_of_padding_alone() -> Case:
    """64 columns of which 40 are true: at four ranks the last shard has none."""
    logits = torch.randn(4, 64)
    logits[:, 40:] = 1e4
    return Case(logits, torch.randint(0, 40, (4, 5)), vocab_size=40)


def a_shard_of_minus_infinity() -> Case:
    """One rank's maximum is −inf and its sum 0; the ids avoid it, as log 0 isn't a number."""
    logits = torch.randn(4, 64)
    logits[:, 16:32] = -torch.inf
    return Case(logits, torch.randint(32, 64, (4, 5)), 1.0, 2.0)


def shards_of_very_different_size() -> Case:
    """The maximum of the other ranks must come off first: exp(500) isn't a float32."""
    return Case(torch.randn(4, 64) + torch.arange(64) * 8.0, torch.randint(0, 64, (4, 20)))


def no_ids() -> Case:
    return Case(torch.randn(4, 64), torch.zeros(4, 0, dtype=torch.long))


def no_rows() -> Case:
    return Case(torch.randn(0, 64), torch.zeros(0, 3, dtype=torch.long))


def all_masked() -> Case:
    """A micro-batch without a single trained token: zero gradient, and no rank waits for ever."""
    return Case(
        torch.randn(4, 64),
        torch.full((4, 3), -1),
        grad_logq=torch.zeros(4, 3),
        grad_lse=torch.zeros(4),
    )


CASES: dict[str, Callable[[], Case]] = {
    "float32": lambda: plain(4 * 1001, torch.float32),
    "bfloat16": lambda: plain(4 * 1001, torch.bfloat16),
    "float16": lambda: plain(4 * 33, torch.float16),
    "two temperatures, float32": lambda: two_temperatures(torch.float32),
    "two temperatures, bfloat16": lambda: two_temperatures(torch.bfloat16),
    "two temperatures, float16": lambda: two_temperatures(torch.float16),
} | {
    case.__name__.replace("_", " "): case
    for case in (
        all_ids_on_the_last_rank,
        more_ids_than_a_shard_has,
        a_shard_of_padding_alone,
        a_shard_of_minus_infinity,
        shards_of_very_different_size,
        no_ids,
        no_rows,
        all_masked,
    )
}
if not ON_GPU:
    CASES["float64"] = lambda: plain(64, torch.float64)


def check_replicated_loss(group: dist.ProcessGroup) -> None:
    """A mean loss written as users write it, backward() called on every rank: the gradient is that
    of one rank, not multiplied by their number nor cut to the shard's share of the teacher."""
    logits = torch.randn(6, 32)
    ids = torch.stack([torch.randperm(32)[:8] for _ in range(6)])
    teacher = torch.rand(6, 8).div(8)

    def loss(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        logq, _ = sparse_log_softmax(logits, ids, tp_group=group)
        return -(teacher * logq).sum(-1).mean() - logq[:, 0].mean()

    whole = logits.clone().requires_grad_()
    loss(whole, None).backward()
    columns = 32 // group.size()
    shard = slice(group.rank() * columns, (group.rank() + 1) * columns)
    part = logits[:, shard].clone().requires_grad_()
    loss(part, group).backward()
    error = (part.grad - whole.grad[:, shard]).abs().max()
    assert error <= FLOAT32_ERROR * whole.grad.abs().max()


def check_collectives(group: dist.ProcessGroup) -> None:
    """Two all-reduces forward, none backward, however many ids there are."""
    calls: list[tuple[object, int]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, op: object, group: dist.ProcessGroup) -> None:
        calls.append((op, tensor.numel()))
        all_reduce(tensor, op=op, group=group)

    dist.all_reduce = counted
    try:
        logits = torch.randn(6, 32, requires_grad=True)
        logq, lse = sparse_log_softmax(logits, torch.randint(0, 32, (6, 8)), tp_group=group)
        (logq.sum() + lse.sum()).backward()
    finally:
        dist.all_reduce = all_reduce
    assert calls == [(dist.ReduceOp.MAX, 6), (dist.ReduceOp.SUM, 6 * 9)] * (group.size() > 1)


def check_ids_are_global(group: dist.ProcessGroup) -> None:
    """Every rank refuses an id beyond the whole vocabulary, so that none waits for the others."""
    with pytest.raises(IndexError, match=f"from 0 to {16 * group.size() - 1}"):
        sparse_log_softmax(torch.randn(1, 16), torch.tensor([[16 * group.size()]]), tp_group=group)


def run_rank(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    failures = []
    for size in (1, 2, 4):
        groups = [
            dist.new_group(list(range(first, first + size))) for first in range(0, RANKS, size)
        ]
        group = groups[rank // size]
        for name, make in CASES.items():
            for inplace_backward in (False, True):
                torch.manual_seed(seed)
                case = make()
                try:
                    assert_shards_agree(case, group, inplace_backward)
                except AssertionError as error:
                    failures.append(f"{name}, tp {size}, in place {inplace_backward}: {error}")
        torch.manual_seed(seed)
        for check in (check_replicated_loss, check_collectives, check_ids_are_global):
            try:
                check(group)
            except (AssertionError, pytest.fail.Exception) as error:
                failures.append(f"{check.__name__}, tp {size}: {error}")
    torch.save(failures, f"{folder}/failures.{rank}")
    dist.destroy_process_group()


def test_values_and_gradients_at_1_2_and_4_ranks(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    mp.spawn(run_rank, (str(tmp_path), seed), nprocs=RANKS)
    for rank in range(RANKS):
        failures = torch.load(tmp_path / f"failures.{rank}")
        assert not failures, f"rank {rank}: " + "\n".join(failures)

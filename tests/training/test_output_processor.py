"""Gradients of the output processor at 1, 2 and 4 real ranks against a dense float64 reference.

The known bug of this field leaves the loss right and multiplies the gradient by the number of
tensor-parallel ranks, or loses the share of the other ranks; so hidden states and output weight
are compared, with and without chunks, through Megatron's own output layer; and on Megatron's
context-parallel slices.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import mix, mix_gradient
from megatron_pd.distill.targets import TeacherTargets, top_p_k
from megatron_pd.megatron import cpu
from megatron_pd.train.output_processor import (
    DistillationContext,
    _chunk_length,
    distillation_output_processor,
)

RANKS = 4
S, B, H, V, K = 16, 2, 16, 64, 7
ALPHA = 0.7


def column_parallel_layer(
    weight: Tensor, group: dist.ProcessGroup, sequence_parallel: bool = False
) -> Any:
    """Megatron's output layer, without a weight of its own: `weight` is this rank's shard."""
    cpu.install()
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        sequence_parallel=sequence_parallel and group.size() > 1,
    )
    return ColumnParallelLinear(
        weight.shape[1],
        weight.shape[0] * group.size(),
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=group,
    )


def random_case() -> tuple[Tensor, Tensor, Tensor, TeacherTargets]:
    """Hidden states [S, B, H], weight [V, H], labels [B, S], rows of which some are empty."""
    teacher = top_p_k(torch.randn(B, S, V) * 3, top_k=K)
    counts = teacher.counts * (torch.rand(B, S) > 0.2)
    labels = torch.randint(0, V, (B, S))
    teacher = TeacherTargets(teacher.ids, teacher.logprobs, counts.int())
    return torch.randn(S, B, H), torch.randn(V, H), labels, teacher


def dense_losses(
    config: PDConfig, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: TeacherTargets
) -> tuple[Tensor, Tensor]:
    """Eq. 2 to 4 over the whole vocabulary, one token after another; all [B, S]."""
    lm, kd = [], []
    for b in range(B):
        for s in range(S):
            logits = hidden[s, b] @ weight.T
            lm.append(-torch.log_softmax(logits, dim=-1)[labels[b, s]])
            n = int(teacher.counts[b, s])
            ids = teacher.ids[b, s, :n].long()
            stored = teacher.logprobs[b, s, :n].double()
            logt = torch.log_softmax(stored / config.temperature, dim=-1)
            logq = torch.log_softmax(logits / config.student_temperature, dim=-1)[ids]
            kd.append((logt.exp() * (logt - logq)).sum())
    return torch.stack(lm).view(B, S), torch.stack(kd).view(B, S)


def check(group: dist.ProcessGroup, chunk_tokens: int | None, sequence_parallel: bool) -> None:
    config = PDConfig(temperature=2.0, student_temperature=1.5, loss_chunk_tokens=chunk_tokens)
    hidden, weight, labels, teacher = random_case()
    weight_of_token = torch.rand(B, S)
    reference_hidden = hidden.double().requires_grad_()
    reference_weight = weight.double().requires_grad_()
    lm, kd = dense_losses(config, reference_hidden, reference_weight, labels, teacher)
    (mix(ALPHA, lm, kd, teacher.counts) * weight_of_token).sum().backward()

    rows = slice(group.rank() * V // group.size(), (group.rank() + 1) * V // group.size())
    length = S // group.size() if sequence_parallel else S
    positions = slice(group.rank() * length, (group.rank() + 1) * length)
    if not sequence_parallel:
        positions = slice(0, S)
    own_hidden = hidden[positions].clone().requires_grad_()
    own_weight = weight[rows].clone().requires_grad_()
    losses = distillation_output_processor(
        hidden_states=own_hidden,
        output_layer=column_parallel_layer(own_weight, group, sequence_parallel),
        output_weight=own_weight,
        labels=labels,
        context=DistillationContext(
            config,
            teacher,
            group,
            sequence_parallel,
            3 * mix_gradient(ALPHA, teacher.counts) * weight_of_token,
        ),
        scale_logits=lambda logits: logits,
        runtime_gather_output=None,
    )
    (mix(ALPHA, losses[0], losses[1], teacher.counts) * weight_of_token).sum().backward()

    for found, expected in (
        (losses[0], lm),
        (losses[1], kd),
        (own_hidden.grad, reference_hidden.grad[positions]),
        (own_weight.grad, reference_weight.grad[rows]),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


def check_context_parallel(
    tp_group: dist.ProcessGroup, cp_group: dist.ProcessGroup, chunk_tokens: int | None
) -> None:
    """Megatron's slice of hidden states, labels and teacher rows (two pieces from opposite ends)
    against the whole sequence without chunks."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    hidden, weight, labels, teacher = random_case()
    positions = torch.arange(S).expand(B, S)
    whole = {
        "hidden": hidden.transpose(0, 1).contiguous(),
        "labels": labels,
        "ids": teacher.ids,
        "logprobs": teacher.logprobs,
        "counts": teacher.counts,
        "positions": positions,
    }

    def run(batch: dict[str, Any], chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [2, B, S], gradients of the hidden states [B, S, H] and of the weight."""
        own_hidden = batch["hidden"].clone().requires_grad_()
        own_weight = weight.clone().requires_grad_()
        rows = TeacherTargets(batch["ids"], batch["logprobs"], batch["counts"])
        losses = distillation_output_processor(
            hidden_states=own_hidden.transpose(0, 1),
            output_layer=column_parallel_layer(own_weight, tp_group),
            output_weight=own_weight,
            labels=batch["labels"],
            context=DistillationContext(
                PDConfig(loss_chunk_tokens=chunk),
                rows,
                tp_group,
                False,
                torch.ones(2, *batch["labels"].shape),
            ),
            scale_logits=lambda logits: logits,
            runtime_gather_output=None,
        )
        losses.sum().backward()
        return losses.detach(), own_hidden.grad, own_weight.grad

    losses, hidden_grad, weight_grad = run(whole, None)
    own = get_batch_on_this_cp_rank({**whole, "cu_seqlens": None}, False, cp_group)
    own_losses, own_hidden_grad, own_weight_grad = run(own, chunk_tokens)
    dist.all_reduce(own_weight_grad, group=cp_group)
    taken = own["positions"][0]
    assert len(taken) == S // cp_group.size()
    torch.testing.assert_close(own_losses, losses[..., taken])
    torch.testing.assert_close(own_hidden_grad, hidden_grad[:, taken], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_weight_grad, weight_grad, rtol=1e-4, atol=2e-5)


def run_rank(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron wants it under tensor parallelism
    cpu.install()
    # Autograd runs Megatron's backward without the mode that makes "cuda" tensors on the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core import parallel_state

    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    failures = []
    for size in (1, 2, 4):
        parallel_state.initialize_model_parallel(size)
        group = parallel_state.get_tensor_model_parallel_group()
        for chunk_tokens in (None, 1, 10, 1000):
            for sequence_parallel in (False, True):
                torch.manual_seed(seed)
                try:
                    check(group, chunk_tokens, sequence_parallel)
                except AssertionError as error:
                    failures.append(
                        f"tp {size}, chunk {chunk_tokens}, sp {sequence_parallel}: {error}"
                    )
        parallel_state.destroy_model_parallel()
    for size in (2, 4):
        parallel_state.initialize_model_parallel(context_parallel_size=size)
        groups = (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_context_parallel_group(),
        )
        for chunk_tokens in (None, 3):
            torch.manual_seed(seed)
            try:
                check_context_parallel(*groups, chunk_tokens)
            except AssertionError as error:
                failures.append(f"cp {size}, chunk {chunk_tokens}: {error}")
        parallel_state.destroy_model_parallel()
    torch.save(failures, f"{folder}/failures.{rank}")
    dist.destroy_process_group()


def test_gradients_at_1_2_and_4_ranks(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    mp.spawn(run_rank, (str(tmp_path), seed), nprocs=RANKS)
    for rank in range(RANKS):
        failures = torch.load(tmp_path / f"failures.{rank}")
        assert not failures, f"rank {rank}: " + "\n".join(failures)


@pytest.mark.parametrize(
    ("shape", "ranks", "dtype", "chunk", "expected"),
    [
        ((4096, 1, 4096), 1, torch.bfloat16, "auto", 4096),  # saves 4 KB an id and takes 16
        ((4096, 4, 4096), 1, torch.bfloat16, "auto", 512),  # 28 KB and 16
        ((1024, 4, 4096), 4, torch.bfloat16, "auto", 128),
        ((4096, 2, 4096), 1, torch.float32, "auto", 1024),  # 24 KB and 16
        ((2048, 1, 16), 1, torch.float32, "auto", 2048),  # a chunk is all there is
        ((4096, 1, 16), 1, torch.bfloat16, None, 4096),
        ((4096, 2, 4096), 2, torch.bfloat16, 1000, 250),
        ((4096, 2, 4096), 2, torch.bfloat16, 1, 1),
    ],
)
def test_length_of_a_chunk(
    shape: tuple[int, int, int], ranks: int, dtype: torch.dtype, chunk: Any, expected: int
) -> None:
    hidden = torch.empty(shape, dtype=dtype, device="meta")
    assert _chunk_length(chunk, hidden, ranks) == expected


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors [..., columns] that were alive at once, `weight` aside."""

    def __init__(self, columns: int, weight: Tensor) -> None:
        super().__init__()
        self.columns, self.peak = columns, 0
        self._weight = weight.untyped_storage().data_ptr()
        self._alive: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape[-1:] == (self.columns,):
            if result.untyped_storage().data_ptr() != self._weight:
                self._alive.add(result.untyped_storage())
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))
        return result


@contextmanager
def one_rank(folder: Path) -> Iterator[dist.ProcessGroup]:
    folder.mkdir(exist_ok=True)
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_chunks_bound_the_memory_of_the_logits(tmp_path: Path) -> None:
    columns, length = 4096, 64
    hidden, weight = torch.randn(length, 1, H), torch.randn(columns, H)
    labels = torch.randint(0, columns, (1, length))
    teacher = top_p_k(torch.randn(1, length, columns), top_k=K)
    peaks, grads = {}, {}
    with one_rank(tmp_path) as group:
        for chunk_tokens in (None, 16, 4):
            own = hidden.clone().requires_grad_()
            with PeakMemory(columns, weight) as memory:
                distillation_output_processor(
                    hidden_states=own,
                    output_layer=column_parallel_layer(weight, group),
                    output_weight=weight,
                    labels=labels,
                    context=DistillationContext(
                        PDConfig(loss_chunk_tokens=chunk_tokens),
                        teacher,
                        group,
                        False,
                        torch.ones(2, 1, length),
                    ),
                    scale_logits=lambda logits: logits,
                    runtime_gather_output=None,
                ).sum().backward()
            peaks[chunk_tokens], grads[chunk_tokens] = memory.peak, own.grad
    logits_bytes = length * columns * 4
    assert peaks[None] >= logits_bytes
    for chunk_tokens in (16, 4):
        # One chunk's logits, and a chunk's that are being freed.
        assert 0 < peaks[chunk_tokens] <= 2 * logits_bytes * chunk_tokens // length
        torch.testing.assert_close(grads[chunk_tokens], grads[None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_weight", [False, True])
def test_the_weights_gradient_is_summed_in_float32_over_chunks(
    tmp_path: Path, own_weight: bool
) -> None:
    """300 equal gradients, one a chunk: a bf16 sum would stop at 256 of them. The weight is handed
    over, as with tied embeddings, or the output layer's own."""
    length, columns = 300, 8
    hidden = torch.ones(length, 1, H, dtype=torch.bfloat16)
    weight = torch.zeros(columns, H, dtype=torch.bfloat16, requires_grad=True)
    empty = TeacherTargets(
        torch.full((1, length, 0), -1, dtype=torch.int32),
        torch.zeros(1, length, 0),
        torch.zeros(1, length, dtype=torch.int32),
    )
    with one_rank(tmp_path) as group:
        layer = column_parallel_layer(weight, group)
        if own_weight:
            layer.weight = weight
        losses = distillation_output_processor(
            hidden_states=hidden,
            output_layer=layer,
            output_weight=None if own_weight else weight,
            labels=torch.zeros(1, length, dtype=torch.long),
            context=DistillationContext(
                PDConfig(loss_chunk_tokens=1),
                empty,
                group,
                False,
                mix_gradient(ALPHA, empty.counts),
            ),
            scale_logits=lambda logits: logits,
            runtime_gather_output=None,
        )
        losses[0].sum().backward()
    expected = torch.full((columns, H), length / columns)
    expected[0] -= length
    torch.testing.assert_close(weight.grad.float(), expected, rtol=0.005, atol=0.0)


def chunked_losses(
    group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    expected: Tensor | None,
    fuses: bool = False,
) -> Tensor:
    """[2, B, S] of the tokens of `hidden`, in four chunks."""
    length = len(hidden)
    teacher = top_p_k(torch.randn(1, length, len(weight)), top_k=K)
    layer = column_parallel_layer(weight, group)
    layer.gradient_accumulation_fusion = fuses
    return distillation_output_processor(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=weight,
        labels=torch.randint(0, len(weight), (1, length)),
        context=DistillationContext(
            PDConfig(loss_chunk_tokens=length // 4), teacher, group, False, expected
        ),
        scale_logits=lambda logits: logits,
        runtime_gather_output=None,
    )


class MatrixProducts(TorchDispatchMode):
    """Multiplications of all products with the output layer's matrix, or of its size."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_chunks_cost_three_matrix_products(tmp_path: Path) -> None:
    length, columns = 16, 32
    hidden = torch.randn(length, 1, H, requires_grad=True)
    weight = torch.randn(columns, H, requires_grad=True)
    with one_rank(tmp_path) as group, MatrixProducts() as products:
        losses = chunked_losses(group, hidden, weight, torch.ones(2, 1, length))
        losses.sum().backward()
    assert products.flops == 3 * length * columns * H
    with torch.no_grad(), one_rank(tmp_path / "again") as group, MatrixProducts() as products:
        found = chunked_losses(group, hidden, weight, torch.ones(2, 1, length))
    assert products.flops == length * columns * H and not found.requires_grad


def test_a_gradient_that_was_not_expected_is_refused(tmp_path: Path) -> None:
    """One token that weighs another way; and a second backward pass."""
    length = 16
    hidden = torch.randn(length, 1, H, requires_grad=True)
    weight = torch.randn(32, H, requires_grad=True)
    expected = torch.rand(2, 1, length)
    with one_rank(tmp_path) as group:
        for wrong in (expected.index_fill(2, torch.tensor(5), 0.7), torch.ones_like(expected)):
            losses = chunked_losses(group, hidden, weight, expected)
            with pytest.raises(RuntimeError, match="--pd-loss-chunk-tokens: the gradient"):
                losses.backward(wrong)
        assert hidden.grad is None and weight.grad is None
        losses = chunked_losses(group, hidden, weight, torch.zeros_like(expected))
        losses.backward(torch.zeros_like(expected))
        assert not hidden.grad.any() and not weight.grad.any()
        losses = chunked_losses(group, hidden, weight, expected)
        losses.backward(-3 * expected, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.backward(-3 * expected)
        with pytest.raises(ValueError, match="expected_gradient"):
            chunked_losses(group, hidden, weight, None)


def test_with_megatrons_fusion_the_weights_gradient_is_added_to_main_grad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel, which is a GPU's, stood in for; and what it tells DDP by."""
    from megatron.core.tensor_parallel import layers

    kernel = SimpleNamespace(
        wgrad_gemm_accum_fp32=lambda hidden, grad, total: total.addmm_(grad.T, hidden)
    )
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    hidden, weight = torch.randn(16, 1, H, requires_grad=True), torch.randn(32, H)
    expected = torch.rand(2, 1, 16)
    gradients = []
    with one_rank(tmp_path) as group:
        for fuses in (False, True):
            own = weight.clone().requires_grad_()
            own.main_grad, own.grad_added_to_main_grad = torch.ones(32, H), False
            torch.manual_seed(1)
            losses = chunked_losses(group, hidden, own, expected, fuses)
            losses.backward(2 * expected)
            assert own.grad_added_to_main_grad == fuses
            gradients.append((own.grad, own.main_grad))
    (grad, untouched), (dummy, main_grad) = gradients
    assert not dummy.any() and torch.equal(untouched, torch.ones(32, H))
    torch.testing.assert_close(main_grad, 1 + grad)

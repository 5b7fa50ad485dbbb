"""LM + distillation loss, forward and backward: megatron_pd beside Megatron's own, in one run.

    python tools/benchmarks/bench_loss.py   # 512 rows of 151,552, K = 50, bf16 and fp32
    python tools/benchmarks/bench_loss.py --rows 64 --vocab-size 32000 --k 100 --dtypes bf16
    python tools/benchmarks/bench_loss.py --device cuda --rows 8192 \\
        --vocab-size 131072 151552 --k 50 100

Every contender gets the same logits and returns the mean of 0.1·LM + 0.9·KD, with KD the forward KL
with a ghost token, as Megatron's offline distillation has it; K = 0 is the LM loss alone. Gradients
are compared before anything is timed. Contenders take turns, and the fastest of the repeats counts.

Floors: forward has to read the logits once, backward has to read them and write as many bytes. The
rows called "floor" are what torch takes for just that on the same memory: its maximum, and its
negation in place. "Operators alone" are the two kernels without the [T, K] arithmetic and Python
around them, and the share of the machine's copy bandwidth that they reach. docs/engine.md has the
floors in bytes and in operations. --json has minimum, median and maximum of every time.
"""

import argparse
import functools
import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from common import (
    Clock,
    Report,
    Spread,
    alternate,
    fastest,
    megatron_on,
    parse,
    parser,
    peak_memory,
    spreads,
)
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import distillation_loss
from megatron_pd.distill.targets import TeacherTargets, top_p_k
from megatron_pd.ops import sparse_log_softmax
from megatron_pd.ops.library import operators

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALPHA = 0.9
CONFIG = PDConfig(loss="kld", tail="ghost")


@dataclass
class Problem:
    """One micro-batch, [S, 1, V] as Megatron has it; K = 0 is the LM loss alone."""

    pristine_SBV: Tensor
    """What the logits are set to before every run: contenders write over them."""

    logits_SBV: Tensor
    labels_SB: Tensor
    teacher_SBK: TeacherTargets

    @property
    def k(self) -> int:
        return self.teacher_SBK.ids.shape[-1]

    def first_columns(self, k: int) -> "Problem":
        """The same logits with the top k of each teacher row."""
        teacher = self.teacher_SBK
        ids, logprobs = (rows[..., :k].contiguous() for rows in (teacher.ids, teacher.logprobs))
        counts = torch.full_like(teacher.counts, k)
        return replace(self, teacher_SBK=TeacherTargets(ids, logprobs, counts))

    @classmethod
    def random(
        cls, rows: int, vocab_size: int, k: int, dtype: torch.dtype, device: str
    ) -> "Problem":
        generator = torch.Generator(device).manual_seed(1)
        pristine = torch.empty(rows, 1, vocab_size, dtype=dtype, device=device)
        pristine.normal_(std=2.0, generator=generator)
        labels = torch.randint(vocab_size, (rows, 1), device=device, generator=generator)
        teacher = random_teacher((rows, 1), vocab_size, k, device, generator)
        if k:
            labels[::2] = teacher.ids[::2, :, 0].long()  # as a rule the label is among them
        return cls(pristine, pristine.clone(), labels, teacher)


def random_teacher(
    shape: tuple[int, int], vocab_size: int, k: int, device: str, generator: torch.Generator
) -> TeacherTargets:
    """The top k of a peaked distribution over 256 ids that are spread evenly, [*shape, k]."""
    width = min(max(256, k), vocab_size)
    head = torch.empty(*shape, width, device=device).normal_(std=3.0, generator=generator)
    kept = top_p_k(head, top_k=max(1, k))
    stride = vocab_size // width
    shift = torch.randint(stride, (*shape, 1), device=device, generator=generator)
    ids = (kept.ids * stride + shift).int()
    counts = torch.full(shape, k, dtype=torch.int32, device=device)
    return TeacherTargets(ids[..., :k], kept.logprobs[..., :k], counts)


class _OutputLayer(torch.autograd.Function):
    """Hands out the logits as an output layer does: not a leaf, and free to be written over."""

    @staticmethod
    def forward(ctx, trigger: Tensor, logits: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        # Not a view in autograd's eyes, which would forbid Megatron's writing in place.
        same_memory = logits.untyped_storage(), logits.storage_offset(), logits.shape
        return torch.empty(0, dtype=logits.dtype, device=logits.device).set_(*same_memory)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(gradient)
        return None, None, None


# --- the contenders: logits and problem → scalar loss ---------------------------------------------


def megatron_pd_loss(logits_SBV: Tensor, problem: Problem) -> Tensor:
    ids = torch.cat([problem.labels_SB.unsqueeze(-1).int(), problem.teacher_SBK.ids], dim=-1)
    logq, _ = sparse_log_softmax(logits_SBV, ids, inplace_backward=True)
    label_logq, teacher_logq = logq.split([1, problem.k], dim=-1)
    lm = -label_logq.squeeze(-1)
    if problem.k == 0:
        return lm.mean()
    kd = distillation_loss(CONFIG, problem.teacher_SBK, teacher_logq, -lm, problem.labels_SB)
    return torch.lerp(lm, kd, ALPHA).mean()


def megatron_loss(logits_SBV: Tensor, problem: Problem) -> Tensor:
    """Megatron's cached-logits loss and its cross entropy, as its training loop combines them.

    In float32 both write over the logits, and cross entropy leaves its softmax there: it is last.
    """
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    kd = _megatron_kd(logits_SBV, problem) if problem.k else None
    lm = vocab_parallel_cross_entropy(logits_SBV, problem.labels_SB, tp_group=dist.group.WORLD)
    return lm.mean() if kd is None else torch.lerp(lm.mean(), kd.mean(), ALPHA)


def megatron_fused_loss(logits_SBV: Tensor, problem: Problem) -> Tensor:
    """The same with Megatron's fused cross entropy (--cross-entropy-loss-fusion)."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    kd = _megatron_kd(logits_SBV, problem) if problem.k else None
    lm = fused_vocab_parallel_cross_entropy(logits_SBV, problem.labels_SB, dist.group.WORLD)
    return lm.mean() if kd is None else torch.lerp(lm.mean(), kd.mean(), ALPHA)


def _megatron_kd(logits_SBV: Tensor, problem: Problem) -> Tensor:
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    return topk_kl_div(
        logits_SBV,
        problem.teacher_SBK.logprobs,
        problem.teacher_SBK.ids.long(),
        1,
        0,
        dist.group.WORLD,
        add_ghost_token=True,
    )


def dense_loss(logits_SBV: Tensor, problem: Problem) -> Tensor:
    """What one writes first in PyTorch: a float32 log-softmax of everything, then gather."""
    logq_SBV = torch.log_softmax(logits_SBV.float(), dim=-1)
    lm = -logq_SBV.gather(-1, problem.labels_SB.unsqueeze(-1)).squeeze(-1)
    if problem.k == 0:
        return lm.mean()
    logq = logq_SBV.gather(-1, problem.teacher_SBK.ids.long())
    kd = distillation_loss(CONFIG, problem.teacher_SBK, logq, -lm, problem.labels_SB)
    return torch.lerp(lm, kd, ALPHA).mean()


Contender = Callable[[Tensor, Problem], Tensor]


def contenders() -> dict[str, Contender]:
    """All that can run here; says so where Megatron's can't."""
    megatron = {"Megatron": megatron_loss, "Megatron, fused CE": megatron_fused_loss}
    try:
        importlib.import_module("megatron.training.distillation.cached_logits_loss")
    except ImportError as error:
        print(f"Without Megatron's losses: {error}.")
        megatron = {}
    return {"megatron_pd": megatron_pd_loss, **megatron, "dense PyTorch": dense_loss}


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Measurement:
    times_ms: dict[str, Spread]
    """Of the forward and the backward pass: `forward_ms`, `backward_ms`."""

    peak_bytes: int
    """Most memory in use during a run beyond what was there before it: the logits and teacher."""

    loss: float

    @property
    def forward_ms(self) -> float:
        return self.times_ms["forward_ms"].min

    @property
    def backward_ms(self) -> float:
        return self.times_ms["backward_ms"].min

    @property
    def both_ms(self) -> float:
        return self.forward_ms + self.backward_ms


Key = tuple[str, int]
"""A contender's name and K."""

Run = Callable[[], dict[str, float]]
"""Measures once: `forward_ms`, `backward_ms` and the loss."""


def measure(runs: dict[Key, Run], device: str, repeats: int) -> dict[Key, Measurement]:
    """The times of `repeats` runs, for which all take turns, and the memory of one more."""
    times = alternate(runs, repeats)
    results = {}
    for key, run in runs.items():
        with peak_memory(device) as peak:
            run()
        loss = times[key].pop("loss").min
        results[key] = Measurement(times[key], peak[0], loss)
    return results


def gradient(contender: Contender, problem: Problem) -> Tensor:
    """Gradient of the logits, which may be the logits' own memory."""
    gradients: list[Tensor] = []
    problem.logits_SBV.copy_(problem.pristine_SBV)
    _forward(contender, problem, gradients).backward()
    return gradients[0]


def _forward(contender: Contender, problem: Problem, gradients: list[Tensor]) -> Tensor:
    trigger = torch.zeros((), device=problem.logits_SBV.device, requires_grad=True)
    return contender(_OutputLayer.apply(trigger, problem.logits_SBV, gradients), problem)


def _run(contender: Contender, problem: Problem, clock: Clock) -> dict[str, float]:
    problem.logits_SBV.copy_(problem.pristine_SBV)
    gradients: list[Tensor] = []
    start = clock()
    loss = _forward(contender, problem, gradients)
    middle = clock()
    loss.backward()
    return {
        "forward_ms": middle - start,
        "backward_ms": clock() - middle,
        "loss": loss.item(),
    }


def floors_ms(problem: Problem, clock: Clock, repeats: int) -> tuple[float, float]:
    """Milliseconds of one read of the logits, and of one read and write in place."""
    words = problem.logits_SBV.view(torch.int16).flatten()
    words = words[: words.numel() // 2 * 2].view(torch.float32)
    words.fill_(1.0)
    return fastest(words.amax, clock, repeats), fastest(words.neg_, clock, repeats)


def copy_bandwidth(problem: Problem, clock: Clock, repeats: int) -> float:
    """Bytes per second, read and written, of a copy of the logits."""
    copy = lambda: problem.logits_SBV.copy_(problem.pristine_SBV)
    return 2e3 * problem.logits_SBV.nbytes / fastest(copy, clock, repeats)


def operators_ms(problem: Problem, clock: Clock, repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward and the in-place backward operator by themselves."""
    logits_SBV = problem.logits_SBV.copy_(problem.pristine_SBV)
    labels_SB1 = problem.labels_SB.unsqueeze(-1).int()
    ids_TK = torch.cat([labels_SB1, problem.teacher_SBK.ids], dim=-1).flatten(0, 1)
    shared = ids_TK, torch.ones(1, 1, device=logits_SBV.device)
    shard = 0, logits_SBV.shape[-1]
    statistics = operators.sparse_log_softmax_forward(logits_SBV, *shared, *shard)
    grad_logq_TNK = torch.rand_like(ids_TK, dtype=torch.float32).unsqueeze(1)
    gradients = grad_logq_TNK, statistics[0].new_zeros(len(ids_TK), 1)
    forward = lambda: operators.sparse_log_softmax_forward(logits_SBV, *shared, *shard)
    backward = lambda: operators.sparse_log_softmax_backward_(
        logits_SBV, *shared, *statistics, *gradients, *shard
    )
    return fastest(forward, clock, repeats), fastest(backward, clock, repeats)


def assert_same(problem: Problem, contenders: dict[str, Contender]) -> None:
    """All contenders must give the first one's gradient, to the coarseness of their float type."""
    first, *others = contenders.items()
    expected = gradient(first[1], problem).float().clone()
    scale = expected.abs().max()
    for name, contender in others:
        error = (gradient(contender, problem).float() - expected).abs().max() / scale
        if not error < 0.01:
            raise SystemExit(
                f"error: the gradients of {name} and {first[0]} differ by {error:.1%}."
            )


QUICK = dict(rows=64, vocab_size=[32_000], dtypes=["bf16"], repeats=5)


def main() -> None:
    arguments = parser(__doc__, repeats=9, device="cpu")
    arguments.set_defaults(threads=2)
    arguments.add_argument("--rows", type=int, default=512, help="tokens (default: %(default)s)")
    arguments.add_argument("--vocab-size", type=int, nargs="+", default=[151_552])
    arguments.add_argument("--k", type=int, nargs="+", default=[50], help="teacher entries a token")
    arguments.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    arguments.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds instead of the clock's, for a machine that others use (--threads 1)",
    )
    arguments.add_argument("--ours-alone", action="store_true", help="without the peers")
    options = parse(arguments, QUICK)

    warnings.filterwarnings("ignore", module="megatron")
    torch.set_num_threads(options.threads)
    report = Report()
    with megatron_on(options.device):
        losses = {"megatron_pd": megatron_pd_loss} if options.ours_alone else contenders()
        figures = [
            compare(vocab_size, dtype, losses, options, report)
            for vocab_size in options.vocab_size
            for dtype in options.dtypes
        ]
    report.save(options, figures)


def compare(
    vocab_size: int,
    dtype: str,
    losses: dict[str, Contender],
    options: argparse.Namespace,
    report: Report,
) -> dict[str, Any]:
    """Print the table of one shape and dtype, and return what it says."""
    counts = sorted({0, *options.k})
    rows, repeats = options.rows, options.repeats
    clock = Clock(options.device, time.process_time if options.cpu_time else time.perf_counter)
    problem = Problem.random(rows, vocab_size, counts[-1], DTYPES[dtype], options.device)
    size = problem.logits_SBV.nbytes
    where = f"{options.threads} threads" if options.device == "cpu" else options.device
    if options.cpu_time:
        where += ", CPU time"
    report.line(f"\n{dtype}, {rows} rows × {vocab_size}, {where}: logits {size / 1e6:.0f} MB")
    report.line(f"{'':24}{'K':>4}{'forward':>11}{'backward':>11}{'both':>11}{'extra peak':>14}")
    figures: dict[str, Any] = dict(dtype=dtype, rows=rows, vocab_size=vocab_size, logits_bytes=size)

    def line(name: str, k: int, forward: float, backward: float, note: str = "") -> None:
        both = forward + backward
        report.line(f"{name:24}{k:4}{forward:8.1f} ms{backward:8.1f} ms{both:8.1f} ms{note}")

    read, write = figures["floors_ms"] = floors_ms(problem, clock, repeats)
    bandwidth = figures["copy_bytes_per_second"] = copy_bandwidth(problem, clock, repeats)
    line("floor", counts[-1], read, write, f"   copy {bandwidth / 1e9:.1f} GB/s")
    times = figures["operators_ms"] = operators_ms(problem, clock, repeats)
    shares = [
        1e3 * passes * size / ms / bandwidth for passes, ms in zip((1, 2), times, strict=True)
    ]
    figures["operators_share_of_copy_bandwidth"] = shares
    line("operators alone", counts[-1], *times, f"   {shares[0]:.0%}, {shares[1]:.0%} of copy")

    runs: dict[Key, Run] = {}
    for k in counts:
        cut = problem.first_columns(k)
        assert_same(cut, losses)
        for name, loss in losses.items():
            runs[name, k] = functools.partial(_run, loss, cut, clock)
    results = measure(runs, options.device, repeats)
    for (name, k), result in results.items():
        peak = f"{result.peak_bytes / size:12.1%}"
        line(name, k, result.forward_ms, result.backward_ms, peak)
    figures["contenders"] = [
        dict(
            name=name,
            k=k,
            forward_ms=result.forward_ms,
            backward_ms=result.backward_ms,
            peak_bytes=result.peak_bytes,
            loss=result.loss,
            min_median_max=spreads(result.times_ms),
        )
        for (name, k), result in results.items()
    ]
    lm = results["megatron_pd", 0].both_ms
    for k in counts[1:]:
        ours, peer = results["megatron_pd", k], results.get(("Megatron", k))
        if peer:
            ratio = peer.both_ms / ours.both_ms
            report.line(f"K = {k}: megatron_pd is {ratio:.1f} times as fast as Megatron.")
        report.line(f"K = {k}: costs {ours.both_ms / lm - 1:+.1%} over K = 0.")
    return figures


if __name__ == "__main__":
    main()

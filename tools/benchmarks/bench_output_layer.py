"""Output layer, LM and KD loss, forward and backward, beside the layer's three matrix products.

    python tools/benchmarks/bench_output_layer.py   # on a GPU: 8192 tokens, 4096 × 151,552, bf16
    python tools/benchmarks/bench_output_layer.py --device cpu --rows 1024 --hidden-size 256 \\
        --vocab-size 32000

Hidden states [tokens, 1, H] and Megatron's own output layer, in bf16 (float32 on the CPU), to the
mean of 0.1·LM + 0.9·KD and to the gradients of both. "Three products" is the least that any of it
can cost: the logits, the hidden states' gradient and the weight's, by torch's matrix product, in
the same precision. Contenders take turns, and the fastest of the repeats counts; gradients are
compared before anything is timed. Peaks are beyond hidden states and weight, gradients included.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_loss import random_teacher
from common import (
    Clock,
    Report,
    Spread,
    alternate,
    megatron_on,
    parse,
    parser,
    peak_memory,
    spreads,
)
from torch import Tensor

from megatron_pd.distill.config import PDConfig
from megatron_pd.distill.objective import mix, mix_gradient
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.train.output_processor import DistillationContext, distillation_output_processor

ALPHA = 0.9
THREE_PRODUCTS = "three products"


class Problem(NamedTuple):
    hidden_SBH: Tensor
    layer: Any
    labels_BS: Tensor
    teacher_BSK: TeacherTargets

    @classmethod
    def random(cls, options: argparse.Namespace) -> "Problem":
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig

        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        config = TransformerConfig(
            num_layers=1,
            hidden_size=options.hidden_size,
            num_attention_heads=1,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=options.device == "cpu",
            gradient_accumulation_fusion=False,
        )
        layer = ColumnParallelLinear(
            options.hidden_size,
            options.vocab_size,
            config=config,
            init_method=partial(torch.nn.init.normal_, std=0.02),
            bias=False,
            skip_bias_add=False,
            gather_output=False,
        ).to(options.device)
        generator = torch.Generator(options.device).manual_seed(1)
        shape = options.rows, 1, options.hidden_size
        hidden = torch.randn(shape, device=options.device, generator=generator).to(dtype)
        shape = 1, options.rows
        labels = torch.randint(
            options.vocab_size, shape, device=options.device, generator=generator
        )
        teacher = random_teacher(shape, options.vocab_size, options.k, options.device, generator)
        return cls(hidden.requires_grad_(), layer, labels, teacher)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the hidden states and the weight; they are forgotten here."""
        found = self.hidden_SBH.grad, self.layer.weight.grad
        self.hidden_SBH.grad = self.layer.weight.grad = None
        return found


def lm_only(problem: Problem) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_SBV, _ = problem.layer(problem.hidden_SBH)
    return vocab_parallel_cross_entropy(logits_SBV.float(), problem.labels_BS.T).mean()


def distilled(problem: Problem, config: PDConfig) -> Tensor:
    lm_BS, kd_BS = distillation_output_processor(
        hidden_states=problem.hidden_SBH,
        output_layer=problem.layer,
        output_weight=None,
        labels=problem.labels_BS,
        context=DistillationContext(
            config,
            problem.teacher_BSK,
            problem.layer.tp_group,
            sequence_parallel=False,
            expected_gradient=mix_gradient(ALPHA, problem.teacher_BSK.counts),
        ),
        scale_logits=lambda logits: logits,
        runtime_gather_output=None,
    )
    return mix(ALPHA, lm_BS, kd_BS, problem.teacher_BSK.counts).mean()


def step(problem: Problem, clock: Clock, loss_of: Callable[[Problem], Tensor]) -> dict[str, float]:
    problem.gradients()
    start = clock()
    loss = loss_of(problem)
    middle = clock()
    loss.backward()
    return {"forward_ms": middle - start, "backward_ms": clock() - middle}


def three_products(problem: Problem, clock: Clock) -> dict[str, float]:
    problem.gradients()
    hidden_TH, weight_VH = problem.hidden_SBH.detach()[:, 0], problem.layer.weight.detach()
    start = clock()
    logits_TV = hidden_TH @ weight_VH.T
    middle = clock()
    _products = logits_TV @ weight_VH, logits_TV.T @ hidden_TH
    return {"forward_ms": middle - start, "backward_ms": clock() - middle}


def assert_same_gradients(
    problem: Problem, whole: Callable[[Problem], Tensor], chunked: Callable[[Problem], Tensor]
) -> None:
    gradients = []
    for loss_of in (whole, chunked):
        loss_of(problem).backward()
        gradients.append(problem.gradients())
    for expected, found in zip(*gradients, strict=True):
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        if not difference < 0.01:
            raise SystemExit(f"error: the gradient in chunks is another: by {difference:.1%}.")


QUICK = dict(device="cpu", rows=512, hidden_size=128, vocab_size=8000)


def main() -> None:
    arguments = parser(__doc__, repeats=9, device="cuda")
    arguments.add_argument("--rows", type=int, default=8192, help="tokens")
    arguments.add_argument("--hidden-size", type=int, default=4096)
    arguments.add_argument("--vocab-size", type=int, default=151_552)
    arguments.add_argument("--k", type=int, default=50, help="teacher entries a token")
    arguments.add_argument("--chunk-tokens", type=int, help="default: a quarter of the tokens")
    options = parse(arguments, QUICK)

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report()
    with megatron_on(options.device):
        figures = compare(options, report)
    report.save(options, figures)


def compare(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Print the table and return what it says."""
    problem, clock = Problem.random(options), Clock(options.device)
    chunk = options.chunk_tokens or options.rows // 4
    whole = partial(distilled, config=PDConfig(loss="kld", tail="ghost"))
    chunked = partial(distilled, config=PDConfig(loss="kld", tail="ghost", loss_chunk_tokens=chunk))
    assert_same_gradients(problem, whole, chunked)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        THREE_PRODUCTS: partial(three_products, problem, clock),
        "LM only, Megatron": partial(step, problem, clock, lm_only),
        "megatron_pd": partial(step, problem, clock, whole),
        f"megatron_pd, chunks of {chunk}": partial(step, problem, clock, chunked),
    }
    for warm_up in runs.values():
        warm_up()
    times = alternate(runs, options.repeats)
    peaks = {name: peak_of(problem, options.device, run) for name, run in runs.items()}
    totals = {name: both_ms(parts) for name, parts in times.items()}
    report.line(
        f"\n{options.rows} tokens, hidden {options.hidden_size}, vocabulary {options.vocab_size}, "
        f"K = {options.k}, {problem.hidden_SBH.dtype}, {options.device}: logits "
        f"{problem.hidden_SBH.element_size() * options.rows * options.vocab_size / 1e6:.0f} MB"
    )
    report.line(f"{'':32}{'forward':>11}{'backward':>11}{'both':>11}{'ratio':>8}{'peak':>12}")
    for name, parts in times.items():
        cells = "".join(f"{parts[part].min:8.1f} ms" for part in ("forward_ms", "backward_ms"))
        ratio = totals[name] / totals[THREE_PRODUCTS]
        report.line(
            f"{name:32}{cells}{totals[name]:8.1f} ms{ratio:8.3f}{peaks[name] / 1e6:9.0f} MB"
        )
    settings = vars(options).items()
    return {
        "options": {n: str(v) for n, v in settings if n not in ("json", "output", "quick")},
        "contenders": [
            dict(
                name=name,
                forward_ms=parts["forward_ms"].min,
                backward_ms=parts["backward_ms"].min,
                over_three_products=totals[name] / totals[THREE_PRODUCTS],
                peak_bytes=peaks[name],
                min_median_max=spreads(parts),
            )
            for name, parts in times.items()
        ],
    }


def both_ms(parts: dict[str, Spread]) -> float:
    return parts["forward_ms"].min + parts["backward_ms"].min


def peak_of(problem: Problem, device: str, run: Callable[[], object]) -> int:
    problem.gradients()
    with peak_memory(device) as peak:
        run()
    return peak[0]


if __name__ == "__main__":
    main()

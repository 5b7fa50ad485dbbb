"""One training step of a Megatron GPT: LM only by either's loss, distilled by megatron_pd, by
Megatron's own loss.

    python tools/benchmarks/bench_gpt_step.py     # the 1.9B student cut to 4 layers, on a GPU
    python tools/benchmarks/bench_gpt_step.py --device cpu --layers 1 --hidden-size 64 \\
        --seq-length 32 --vocab-size 1000

Megatron's GPTModel in bf16 under its Float16Module, its DistributedDataParallel and its optimizer,
on one device, with random tokens and random teacher rows that lie there already: the steps differ
in the loss alone. Transformer Engine's layers are used where it is installed, Megatron's local ones
otherwise. Megatron's cached-logits loss is its own code, StudentLogitsCapture and topk_kl_div, on
the same rows instead of on its files. The LM losses are compared, and the distilled losses of a
student at temperature 1, before anything is timed. Contenders take turns, and the fastest of the
repeats counts; --json has minimum, median and maximum of every time.
"""

import argparse
import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
from megatron_pd.megatron import cpu
from megatron_pd.train.output_processor import DistillationContext, distillation_output_processor

ALPHA = 0.9
TEMPERED = "megatron_pd, student at τ = 2"


@dataclass
class Batch:
    """One micro-batch; the teacher's rows are batch first."""

    tokens_BS: Tensor
    positions_BS: Tensor
    labels_BS: Tensor
    teacher_BSK: TeacherTargets

    @classmethod
    def random(cls, options: argparse.Namespace) -> "Batch":
        generator = torch.Generator(options.device).manual_seed(1)
        shape = options.micro_batch_size, options.seq_length
        tokens = torch.randint(
            options.vocab_size,
            (shape[0], shape[1] + 1),
            device=options.device,
            generator=generator,
        )
        teacher = random_teacher(shape, options.vocab_size, options.k, options.device, generator)
        positions = torch.arange(shape[1], device=options.device).expand(shape)
        return cls(tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous(), teacher)


@dataclass
class Measurement:
    times_ms: dict[str, Spread]
    """Of a step's parts: `forward_ms`, `backward_ms`, `optimizer_ms`."""

    peak_bytes: int
    """Most memory in use during a step beyond parameters, gradients and optimizer state."""

    loss: float
    """At the last step."""

    def fastest_ms(self) -> dict[str, float]:
        """Of each part by itself, and `step_ms`, their sum."""
        parts = {name: times.min for name, times in self.times_ms.items()}
        return {"step_ms": sum(parts.values()), **parts}


class Trainer:
    """The model with everything that a step of Megatron's training loop does to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = transformer_config(options)
        self.gpt = GPTModel(
            config,
            layer_spec(),
            options.vocab_size,
            options.seq_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        self.gpt.to(options.device)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp, Float16Module(config, self.gpt))
        adam = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16)
        self.optimizer = get_megatron_optimizer(adam, [self.model])
        self.finalize_grads = lambda: finalize_model_grads([self.model])
        self.device = options.device
        self.clock = Clock(options.device)

    def step(self, loss_of: Callable[[], Tensor]) -> dict[str, float]:
        """Milliseconds forward, backward and of the optimizer, and the loss."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        times = [self.clock()]
        loss = loss_of()
        times.append(self.clock())
        loss.backward()
        times.append(self.clock())
        self.finalize_grads()
        self.optimizer.step()
        times.append(self.clock())
        forward, backward, optimizer = (end - start for start, end in itertools.pairwise(times))
        return {
            "forward_ms": forward,
            "backward_ms": backward,
            "optimizer_ms": optimizer,
            "loss": loss.item(),
        }

    def measure(
        self, losses: dict[str, Callable[[], Tensor]], repeats: int
    ) -> dict[str, Measurement]:
        """Times of `repeats` steps with each loss, for which all take turns, and the memory of one
        more."""
        runs = {name: functools.partial(self.step, loss_of) for name, loss_of in losses.items()}
        for warm_up in runs.values():
            warm_up()
        times = alternate(runs, repeats)
        results = {}
        for name, run in runs.items():
            with peak_memory(self.device) as peak:
                run()
            loss = times[name].pop("loss").values[-1]
            results[name] = Measurement(times[name], peak[0], loss)
        return results


def transformer_config(options: argparse.Namespace) -> Any:
    """The 1.9B student of examples/models/1.9b.sh, with the options' sizes."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.hidden_size * 27 // 8,
        num_attention_heads=16,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=options.device == "cpu",
        gradient_accumulation_fusion=False,
        # Megatron's fused kernels for these are of Apex, or compiled at run time.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec() -> Any:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt import gpt_layer_specs

    if HAVE_TE and not cpu.is_cpu():
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")


# --- the contenders: a forward pass that ends in the mean loss ------------------------------------


def lm_only(trainer: Trainer, batch: Batch, *, fused: bool) -> Tensor:
    trainer.gpt.config.cross_entropy_loss_fusion = fused
    return trainer.model(batch.tokens_BS, batch.positions_BS, None, labels=batch.labels_BS).mean()


def distilled(trainer: Trainer, batch: Batch, config: PDConfig) -> Tensor:
    context = DistillationContext(
        config,
        batch.teacher_BSK,
        trainer.gpt.tp_group,
        sequence_parallel=False,
        expected_gradient=mix_gradient(ALPHA, batch.teacher_BSK.counts),
    )
    lm_BS, kd_BS = trainer.model(
        batch.tokens_BS,
        batch.positions_BS,
        None,
        labels=batch.labels_BS,
        output_processor=distillation_output_processor,
        output_processor_context=context,
    )
    return mix(ALPHA, lm_BS, kd_BS, batch.teacher_BSK.counts).mean()


def lm_only_by_us(trainer: Trainer, batch: Batch) -> Tensor:
    """As --pd-lm-only."""
    labels_BS = batch.labels_BS
    nobody = TeacherTargets.empty(tuple(labels_BS.shape), 0, device=labels_BS.device)
    return distilled(trainer, replace(batch, teacher_BSK=nobody), PDConfig())


def cached_logits(trainer: Trainer, batch: Batch) -> Tensor:
    """Megatron's: the logits caught at the output layer, its KL with ghost token, its LM loss."""
    from megatron.training.distillation import StudentLogitsCapture
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    capture = StudentLogitsCapture()
    capture.attach_hooks(trainer.gpt)
    try:
        lm = lm_only(trainer, batch, fused=False)
        logits_SBV = capture.pop()
    finally:
        capture.remove_hooks()
    teacher_SBK = batch.teacher_BSK.map(lambda rows: rows.transpose(0, 1))
    kd = topk_kl_div(
        logits_SBV,
        teacher_SBK.logprobs,
        teacher_SBK.ids.long(),
        1,
        0,
        trainer.gpt.tp_group,
        add_ghost_token=True,
    )
    return torch.lerp(lm, kd.mean(), ALPHA)


def contenders(trainer: Trainer, batch: Batch, chunk: int) -> dict[str, Callable[[], Tensor]]:
    whole = PDConfig(loss="kld", tail="ghost")
    chunked = PDConfig(loss="kld", tail="ghost", loss_chunk_tokens=chunk)
    tempered = PDConfig(loss="kld", student_temperature=2.0)
    return {
        "LM only": lambda: lm_only(trainer, batch, fused=False),
        "LM only, fused CE": lambda: lm_only(trainer, batch, fused=True),
        "LM only, megatron_pd": lambda: lm_only_by_us(trainer, batch),
        "megatron_pd": lambda: distilled(trainer, batch, whole),
        f"megatron_pd, chunks of {chunk}": lambda: distilled(trainer, batch, chunked),
        TEMPERED: lambda: distilled(trainer, batch, tempered),
        "Megatron cached logits": lambda: cached_logits(trainer, batch),
    }


@torch.no_grad()
def assert_same_losses(steps: dict[str, Callable[[], Tensor]]) -> None:
    losses = {name: loss_of().item() for name, loss_of in steps.items()}
    if not max(losses.values()) <= 1.001 * min(losses.values()):
        raise SystemExit(f"error: these losses should be one: {losses}.")


QUICK = dict(
    device="cpu", layers=1, hidden_size=128, vocab_size=8000, seq_length=128, micro_batch_size=2
)


def main() -> None:
    arguments = parser(__doc__, repeats=5, device="cuda")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--hidden-size", type=int, default=2048)
    arguments.add_argument("--vocab-size", type=int, default=151_552)
    arguments.add_argument("--seq-length", type=int, default=4096)
    arguments.add_argument("--micro-batch-size", type=int, default=2)
    arguments.add_argument("--k", type=int, default=50, help="teacher entries a token")
    arguments.add_argument("--chunk-tokens", type=int, help="default: a quarter of the micro-batch")
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
    trainer, batch = Trainer(options), Batch.random(options)
    tokens = batch.tokens_BS.numel()
    chunk = options.chunk_tokens or tokens // 4
    logits_bytes = 2 * tokens * options.vocab_size
    report.line(
        f"\nGPT of {options.layers} layers, hidden {options.hidden_size}, vocabulary "
        f"{options.vocab_size}, {tokens} tokens, K = {options.k}, bf16, {options.device}: "
        f"logits {logits_bytes / 1e6:.0f} MB"
    )
    report.line(f"{'':32}{'forward':>11}{'backward':>11}{'optimizer':>11}{'step':>11}{'peak':>12}")
    losses = contenders(trainer, batch, chunk)
    lm = {name: loss_of for name, loss_of in losses.items() if "LM" in name}
    assert_same_losses(lm)
    assert_same_losses({n: loss for n, loss in losses.items() if n not in (*lm, TEMPERED)})
    results = trainer.measure(losses, options.repeats)
    times = {name: result.fastest_ms() for name, result in results.items()}
    for name, result in results.items():
        parts = ("forward_ms", "backward_ms", "optimizer_ms", "step_ms")
        cells = "".join(f"{times[name][part]:8.1f} ms" for part in parts)
        report.line(f"{name:32}{cells}{result.peak_bytes / 1e6:9.0f} MB")
    lm_ms = times["LM only"]["step_ms"]
    for name in list(losses)[2:]:
        report.line(f"{name}: {times[name]['step_ms'] / lm_ms - 1:+.1%} over the LM-only step.")
    settings = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("json", "output", "quick")
    }
    return {
        "tokens": tokens,
        "logits_bytes": logits_bytes,
        "options": settings,
        "contenders": [
            dict(
                name=name,
                **times[name],
                peak_bytes=result.peak_bytes,
                loss=result.loss,
                min_median_max=spreads(result.times_ms),
            )
            for name, result in results.items()
        ],
    }


if __name__ == "__main__":
    main()

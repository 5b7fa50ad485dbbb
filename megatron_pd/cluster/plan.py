"""What a launch line costs: FLOPs, memory, steps, bytes, and whether distillation pays.

Parameters, FLOPs and memory are Megatron's own estimates where it has one.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.training import theoretical_memory_usage as megatron_memory
from megatron.training.training import num_floating_point_operations

from megatron_pd.cluster import distillation_law as law
from megatron_pd.cluster import sizes
from megatron_pd.cluster.assumptions import Assumptions
from megatron_pd.cluster.launch_line import LaunchLine
from megatron_pd.cluster.layout import readers_per_node, reading_ranks

__all__ = ["Figure", "active_parameters", "plan", "total_parameters"]

_CHUNK = 2048  # --pd-loss-chunk-tokens auto


@dataclass(frozen=True)
class Figure:
    section: str
    name: str
    value: float | None
    unit: str
    note: str = ""


def plan(args: Any, line: LaunchLine, assumed: Assumptions) -> list[Figure]:
    """All figures of a launch line, in the order in which they are shown.

    Args:
        args: Megatron's, validated at the line's world size (`args_at_scale`).
    """
    return [
        *_run(args, line, assumed),
        *_memory(args),
        *_store(args, assumed),
        *_reading(args, line, assumed),
        *_worth(args, assumed),
    ]


def total_parameters(args: Any) -> int:
    """Of the whole model. Megatron's estimate counts them: on one rank, 18 bytes each."""
    alone = copy.copy(args)
    alone.tensor_model_parallel_size = alone.pipeline_model_parallel_size = 1
    alone.expert_tensor_parallel_size = alone.expert_model_parallel_size = 1
    alone.world_size = alone.data_parallel_size = 1
    alone.use_distributed_optimizer = False
    return round(megatron_memory.compute_weight_and_optimizer_memory(alone) / 18)


def active_parameters(args: Any) -> int:
    """Those that a token passes, without the embeddings, as scaling laws count them."""
    active = copy.copy(args)
    if args.num_experts is not None:
        active.num_experts = args.moe_router_topk
    embeddings = args.hidden_size * args.padded_vocab_size
    return total_parameters(active) - embeddings * (
        2 if args.untie_embeddings_and_output_weights else 1
    )


def _samples(args: Any) -> int:
    return args.train_samples or args.train_iters * args.global_batch_size


def _tokens(args: Any) -> int:
    return _samples(args) * args.seq_length


def _step_seconds(args: Any, assumed: Assumptions) -> float:
    flops = num_floating_point_operations(copy.copy(args), args.global_batch_size)
    return float(flops / (args.world_size * assumed.tflops * 1e12))


def _run(args: Any, line: LaunchLine, assumed: Assumptions) -> Iterator[Figure]:
    batch_tokens = args.global_batch_size * args.seq_length
    flops = num_floating_point_operations(copy.copy(args), args.global_batch_size) / batch_tokens
    steps = sizes.steps_of(_tokens(args), batch_tokens)
    seconds = steps * _step_seconds(args, assumed)
    layout = (
        f"TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}, "
        f"CP {args.context_parallel_size}, DP {args.data_parallel_size}"
    )
    parameters = total_parameters(args)
    yield Figure("run", "GPUs", line.world_size, "", layout)
    yield Figure("run", "parameters", parameters, "")
    yield Figure("run", "FLOPs per token", flops, "FLOP", "forward and backward")
    yield Figure("run", "tokens", _tokens(args), "")
    yield Figure("run", "steps", steps, "", f"of {batch_tokens:,} tokens")
    yield Figure("run", "hours", seconds / 3600, "h", f"at {assumed.tflops:g} TFLOP/s a GPU")
    saved = parameters * sizes.CHECKPOINT_BYTES_PER_PARAMETER
    yield Figure("run", "checkpoint", saved, "B", "bf16 weights, float32 weights, two moments")
    if args.save is not None and args.save_interval:
        kept = sizes.checkpoints_kept(steps, args.save_interval, args.save_retain_interval)
        yield Figure("run", "checkpoints on disk", kept * saved, "B", f"{kept} at most")


def _memory(args: Any) -> Iterator[Figure]:
    weights = megatron_memory.compute_weight_and_optimizer_memory(copy.copy(args))
    body = copy.copy(args)
    body.padded_vocab_size = 0  # the logits are ours to count
    estimate = (
        megatron_memory.compute_activation_memory
        if args.sequence_parallel
        else megatron_memory.compute_activation_memory_without_sp
    )
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    activations = estimate(body, micro_batches) / args.context_parallel_size
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    vocabulary = args.padded_vocab_size // args.tensor_model_parallel_size
    width = 2 if args.bf16 or args.fp16 else 4
    whole = sizes.logits_bytes(tokens, vocabulary, width)
    chunk = sizes.loss_chunk_bytes(_CHUNK, vocabulary, args.hidden_size, width)
    of = "of a GPU"
    yield Figure(of, "weights, gradients, optimizer", weights, "B", "Megatron's estimate")
    note = "Megatron's estimate, without recomputation"
    yield Figure(of, "activations", activations, "B", note)
    yield Figure(of, "logits and their gradient", whole, "B", "whole")
    note = f"--pd-loss-chunk-tokens {_CHUNK}"
    yield Figure(of, "logits and their gradient, in chunks", chunk, "B", note)


def _store(args: Any, assumed: Assumptions) -> Iterator[Figure]:
    tokens = _tokens(args)
    dense = sizes.dense_bytes(tokens, args.padded_vocab_size)
    yield Figure("store", "all logits", dense, "B", "float32, which nobody keeps")
    for bits, width in sizes.STORE_BYTES_PER_ENTRY.items():
        size = tokens * assumed.entries * width
        note = f"{assumed.entries:g} entries a token, measured at 160,000 pieces"
        yield Figure("store", f"compact, {bits} bits a value", size, "B", note)
    size = tokens * 50 * sizes.STORE_BYTES_PER_DRAW
    yield Figure("store", "50 random draws a token", size, "B", "--dump-sampled 50")
    rate = assumed.teacher_tokens_per_second
    note = "measured rate" if rate else f"2 FLOPs a parameter at {assumed.tflops:g} TFLOP/s"
    rate = rate or assumed.tflops * 1e12 / (2 * assumed.teacher_parameters)
    hours = tokens / rate / 3600
    yield Figure("store", "teacher's GPU hours", hours, "h", note)


def _reading(args: Any, line: LaunchLine, assumed: Assumptions) -> Iterator[Figure]:
    ranks = reading_ranks(args)
    per_node = readers_per_node(ranks, line.processes_per_node)
    row = assumed.entries * sizes.STORE_BYTES_PER_ENTRY[10]
    rank_bytes = args.global_batch_size / args.data_parallel_size * args.seq_length * row
    step = _step_seconds(args, assumed)
    ranks_note = "the first TP rank of the last stage, for each DP and CP rank"
    yield Figure("reading", "ranks that read the store", len(ranks), "", ranks_note)
    yield Figure("reading", "of them on one node", per_node, "", "at most")
    yield Figure("reading", "a step of one rank", rank_bytes, "B", "10 bits a value")
    note = f"a step of {step:.3g} s"
    yield Figure("reading", "one node", per_node * rank_bytes / step, "B/s", note)


def _worth(args: Any, assumed: Assumptions) -> Iterator[Figure]:
    """By the laws of arXiv 2502.08606."""
    of = "does it pay"
    parameters, tokens = active_parameters(args), _tokens(args)
    teacher = law.supervised_loss(assumed.teacher_parameters, assumed.teacher_tokens)
    flops = num_floating_point_operations(copy.copy(args), args.global_batch_size)
    student_cost = flops / (args.global_batch_size * args.seq_length)
    cost = 2 * assumed.teacher_parameters / student_cost
    yield Figure(of, "teacher's loss", teacher, "nats", "the law's, not that of your teacher")
    yield Figure(of, "teacher's pass", cost, "students", "in trainings of this student")
    lm, kd = law.supervised_loss, law.distilled_loss
    yield Figure(of, "LM only, these tokens", lm(parameters, tokens), "nats")
    more = lm(parameters, tokens * (1 + cost))
    yield Figure(of, "LM only, equal FLOPs", more, "nats", f"{1 + cost:.3g} times the tokens")
    yield Figure(of, "distilled", kd(parameters, tokens, teacher), "nats", "full distributions")
    students = law.students_that_pay(parameters, tokens, teacher, cost)
    note = "with this store, to beat LM only at equal FLOPs"
    yield Figure(of, "students that must share the store", students, "", note)

"""A run cut to a size that one CPU trains in seconds, in its own layout of ranks.

Layers, pipeline stages, tensor and data parallelism, vocabulary, data and --pd-* flags stay; width,
sequence, batch and length shrink. What needs a GPU, or writes where the run will, is left out.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["cut_flags"]

# By Megatron's names, without --: of a GPU; of files; of lengths and widths that are cut.
_LEFT_OUT = """
    sequence-parallel tp-comm-overlap tp-comm-overlap-cfg tp-comm-bootstrap-backend
    context-parallel-size cp-comm-type attention-backend transformer-impl distributed-backend
    fp8-format fp8-recipe fp8-margin fp8-amax-history-len fp8-amax-compute-algo fp8-param-gather
    fp4-format cuda-graph-impl use-megatron-fsdp use-torch-fsdp2 optimizer-cpu-offload
    save load save-interval save-retain-interval async-save async-strategy
    use-persistent-ckpt-worker pretrained-checkpoint use-checkpoint-args
    use-checkpoint-opt-param-scheduler exit-signal-handler
    tensorboard-dir log-timers-to-tensorboard wandb-project wandb-exp-name wandb-save-dir
    wandb-entity eval-interval exit-duration-in-mins exit-interval
    train-samples lr-decay-iters lr-decay-samples lr-warmup-iters lr-warmup-samples
    lr-wsd-decay-samples rampup-batch-size start-weight-decay end-weight-decay
    pd-alpha-warmup pd-alpha-decay pd-alpha-period pd-loss-chunk-tokens
    moe-shared-expert-intermediate-size
""".split()


def cut_flags(args: Any, flags: Sequence[str], cache: str) -> list[str]:
    """The flags of the cut run.

    Args:
        args: Megatron's, of `flags`, validated.
        cache: folder for its sample index, which is another than the run's.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    replicas = args.world_size // (tp * pp)
    cut: dict[str, Any] = {
        "hidden-size": 16 * tp,
        "ffn-hidden-size": 16 * tp,
        "num-attention-heads": tp,
        "kv-channels": 8,
        "seq-length": 128,
        "max-position-embeddings": 128,
        "micro-batch-size": 1,
        "global-batch-size": replicas * max(2, pp),
        "train-iters": 2,
        "lr-wsd-decay-iters": 1,
        "eval-iters": 0,
        "log-interval": 1,
        "num-workers": 0,
        "data-cache-path": cache,
    }
    if args.group_query_attention:
        cut["num-query-groups"] = tp
    if args.num_experts is not None:
        cut["moe-ffn-hidden-size"] = 16 * tp
    kept = _without(flags, {f"--{name}" for name in [*_LEFT_OUT, *cut]})
    return [*kept, *(str(word) for name in cut for word in (f"--{name}", cut[name]))]


def _without(flags: Sequence[str], names: set[str]) -> list[str]:
    """`flags` without some, and without their values."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept

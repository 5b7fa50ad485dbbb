"""Bytes and steps of a run by arithmetic alone: what it trains on, stores, reads and saves."""

import math

__all__ = [
    "CHECKPOINT_BYTES_PER_PARAMETER",
    "STORE_BYTES_PER_DRAW",
    "STORE_BYTES_PER_ENTRY",
    "checkpoints_kept",
    "dense_bytes",
    "logits_bytes",
    "loss_chunk_bytes",
    "steps_of",
]

# Measured: docs/store-benchmark.md, the teacher with 160,000 pieces, by --dump-value-bits.
STORE_BYTES_PER_ENTRY = {8: 1.189, 9: 1.220, 10: 1.308, 11: 1.434, 12: 1.561, 14: 1.814}
STORE_BYTES_PER_DRAW = 21.16 / 50

# bf16 weights, float32 weights and Adam's two moments.
CHECKPOINT_BYTES_PER_PARAMETER = 14


def steps_of(tokens: float, batch_tokens: int) -> int:
    """Iterations that see `tokens`."""
    return math.ceil(tokens / batch_tokens)


def dense_bytes(tokens: float, vocab_size: int) -> float:
    """All of the teacher's logits in float32, as arXiv 2410.16215, §2, counts."""
    return tokens * vocab_size * 4


def logits_bytes(tokens: int, vocab_size: int, width: int) -> int:
    """The logits of a micro-batch on one rank, whose gradient is written over them.

    Args:
        tokens, vocab_size: of this rank's share. width: bytes of a logit.
    """
    return tokens * vocab_size * width


def loss_chunk_bytes(chunk: int, vocab_size: int, hidden: int, width: int) -> int:
    """The same with --pd-loss-chunk-tokens: one chunk's logits and the float32 gradient of the
    output layer's weight (docs/engine.md)."""
    return chunk * vocab_size * width + vocab_size * hidden * 4


def checkpoints_kept(iterations: int, interval: int, retain: int | None) -> int:
    """The most checkpoints on the disk at once: what is retained, the latest, and the one that is
    being written."""
    written = math.ceil(iterations / interval)
    return written if retain is None else min(written, iterations // retain + 2)

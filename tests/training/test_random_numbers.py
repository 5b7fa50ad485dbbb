"""What a run draws at random on a CPU: first weights, and dropout over a stop and a resumption."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import World
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def first_weights(world: World, micro_batch_size: int) -> dict[str, torch.Tensor]:
    checkpoint = world.folder / f"first-{micro_batch_size}"
    world.train(
        *("--micro-batch-size", micro_batch_size, "--train-iters", 1, "--lr", 0, "--min-lr", 0),
        *("--lr-wsd-decay-iters", 1, "--lr-warmup-iters", 0),
        *("--save", checkpoint, "--save-interval", 1, "--no-save-optim"),
    )
    return tensors_of(checkpoint / "iter_0000001")


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    whole = checkpoint / "whole.pt"
    dcp_to_torch_save(checkpoint, whole)
    content: dict[str, Any] = torch.load(whole, weights_only=False)
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def test_first_weights_are_the_seeds_alone(bare_world: World) -> None:
    """Megatron's warm-up draws tensors of a micro-batch's size before it makes the model."""
    ones, fours = (first_weights(bare_world, size) for size in (1, 4))
    assert {name for name in ones if name.startswith("decoder")}
    for name, weights in ones.items():
        assert torch.equal(weights, fours[name]), name
    assert any(weights.float().std() > 0.01 for weights in ones.values())


def test_dropout_goes_on_where_it_stopped(bare_world: World) -> None:
    """The checkpoint is written by processes that Megatron starts anew; recomputing draws again."""
    checkpoint = bare_world.folder / "dropout"
    dropout = ("--attention-dropout", 0.1, "--hidden-dropout", 0.2)
    layout = ("--tensor-model-parallel-size", 2)
    saving = ("--save", checkpoint, "--save-interval", 3, "--async-save", "--async-strategy")
    whole = bare_world.train(
        *(*dropout, *layout, *saving, "mcore", "--use-persistent-ckpt-worker"), ranks=2
    )
    recomputing = "--recompute-granularity full --recompute-method uniform".split()
    resumed = bare_world.train(
        *(*dropout, *layout, "--load", checkpoint, "--ckpt-step", 3),
        *(*recomputing, "--recompute-num-layers", 1),
        ranks=2,
    )
    for tag in ("lm loss", "grad-norm"):
        assert len(resumed[tag]) == 3
        np.testing.assert_array_equal(resumed[tag], whole[tag][3:], err_msg=tag)

"""A run without --pd-* flags is Megatron's own, to the last bit."""

import numpy as np
import pytest
from jobs import World

CASES: dict[str, tuple[int, str]] = {
    "tensor and pipeline parallel, masked, validated": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --eod-mask-loss "
        "--split 90,10,0 --eval-iters 1 --eval-interval 2 --check-for-spiky-loss",
    ),
    "interleaved stages, sparse, distributed optimizer": (
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--num-experts 2 --use-distributed-optimizer --calculate-per-token-loss",
    ),
    "multi-token prediction on a stage between others": (
        4,
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|ttt|m|L "
        "--mtp-num-layers 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_without_pd_flags_a_run_is_megatrons_own(case: str, world: World) -> None:
    ranks, flags = CASES[case]
    argv = world.training_flags(*flags.split())
    expected = world.curves_of(argv, ranks, "stock_job")
    found = world.curves_of(argv, ranks)
    assert found.keys() == expected.keys()
    assert len(expected["lm loss"]) == 6
    for tag in expected.keys() - {"iteration-time"}:
        np.testing.assert_array_equal(found[tag], expected[tag], err_msg=tag)

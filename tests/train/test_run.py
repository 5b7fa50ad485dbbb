"""What is refused before training starts, and what a run is."""

from types import SimpleNamespace

import pytest

from megatron_pd.errors import UserError
from megatron_pd.train.run import _check_layout


def layout(tensor: int, pipeline: int, *, reshardable: bool = False, **settings) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        dist_ckpt_optim_fully_reshardable=reshardable,
        **{
            "load": "ckpt",
            "no_load_optim": False,
            "use_distributed_optimizer": True,
            **settings,
        },
    )


def test_a_distributed_optimizer_saved_for_one_layout_is_refused_in_another():
    saved = layout(2, 1)
    for changed in (layout(1, 1), layout(2, 2), layout(1, 2, reshardable=True)):
        with pytest.raises(UserError, match=r"2 and 1.*--dist-ckpt-optim-fully-reshardable"):
            _check_layout(changed, saved)
    for fits in (layout(2, 1), layout(1, 1, no_load_optim=True)):
        _check_layout(fits, saved)
    _check_layout(layout(1, 2), layout(2, 1, reshardable=True))
    _check_layout(layout(1, 2), layout(2, 1, use_distributed_optimizer=False))
    _check_layout(layout(1, 2), None)

"""What of Megatron is refused before training starts."""

from types import SimpleNamespace

import pytest

from megatron_pd.errors import UserError
from megatron_pd.megatron.unsupported import check_checkpoint


def layout(tensor: int, pipeline: int, *, reshardable: bool = False, **settings) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        dist_ckpt_optim_fully_reshardable=reshardable,
        **{
            "load": "ckpt",
            "no_load_optim": False,
            "use_distributed_optimizer": True,
            "use_checkpoint_opt_param_scheduler": False,
            "train_iters": 9,
            **settings,
        },
    )


def test_a_distributed_optimizer_saved_for_one_layout_is_refused_in_another():
    saved = layout(2, 1)
    for changed in (layout(1, 1), layout(2, 2), layout(1, 2, reshardable=True)):
        with pytest.raises(UserError, match=r"2 and 1.*--dist-ckpt-optim-fully-reshardable"):
            check_checkpoint(changed, saved)
    for fits in (layout(2, 1), layout(1, 1, no_load_optim=True)):
        check_checkpoint(fits, saved)
    check_checkpoint(layout(1, 2), layout(2, 1, reshardable=True))
    check_checkpoint(layout(1, 2), layout(2, 1, use_distributed_optimizer=False))

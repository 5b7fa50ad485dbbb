"""Where Megatron has no hook."""

from argparse import Namespace

import pytest
from megatron.training import checkpointing

from megatron_pd.megatron import patches
from megatron_pd.megatron.launch import default_args


def test_a_models_arguments_are_megatrons() -> None:
    """A name that Megatron doesn't have, or takes from a checkpoint itself, is a mistake."""
    arguments = vars(default_args())
    assert [name for name in patches._MODEL_ARGUMENTS if name not in arguments] == []
    taken = set(checkpointing.load_args_from_checkpoint.__code__.co_consts)
    assert not taken & set(patches._MODEL_ARGUMENTS)


def test_the_checkpoint_says_what_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Namespace(layernorm_epsilon=1e-6, qk_layernorm=True, window_size=None)
    args = Namespace(layernorm_epsilon=1e-5, qk_layernorm=False, window_size=(8, 0), seed=1)
    found: list[object] = [(args, saved), args]
    monkeypatch.setattr(
        checkpointing, "load_args_from_checkpoint", lambda args, load_arg="load": found.pop()
    )
    patches.take_model_from_checkpoint()
    patches.take_model_from_checkpoint()  # once
    # Without a checkpoint Megatron gives the arguments alone.
    assert checkpointing.load_args_from_checkpoint(args) is args
    assert args.layernorm_epsilon == 1e-5
    checkpointing.load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
    assert args == Namespace(layernorm_epsilon=1e-6, qk_layernorm=True, window_size=(8, 0), seed=1)

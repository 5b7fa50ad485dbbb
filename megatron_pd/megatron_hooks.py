"""The few places where Megatron has no hook for what is needed. One adapter each, with its reason.

Written against megatron-core 0.19.2.
"""

from megatron.core.datasets import utils as datasets_utils

__all__ = ["skip_helpers_compilation"]


def skip_helpers_compilation() -> None:
    """Let Megatron start from its wheel.

    `pretrain()` runs `make` in megatron/core/datasets to compile `helpers_cpp`, and exits where
    that fails. The wheel ships the compiled module but not the Makefile.
    """
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    datasets_utils.compile_helpers = lambda: None

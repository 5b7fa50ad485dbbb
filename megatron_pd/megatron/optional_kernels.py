"""Megatron's flags on a GPU machine that lacks Transformer Engine or NVIDIA Apex.

Both are used where they can be imported, and neither is required. Megatron's defaults take them for
granted and would stop where one is missing, so there these flags get defaults that need neither; a
flag given by the user always wins. On a CPU `megatron_pd.megatron.cpu` sets them.

Written against megatron-core 0.19.2. Not run on a GPU.
"""

import argparse
import importlib.util
from typing import Any

from megatron_pd.errors import UserError
from megatron_pd.megatron import cpu

__all__ = ["check_gpu_args", "set_gpu_defaults"]

# Importable module → defaults where it isn't. PyPI's `apex` is another package, so it is Apex's own
# extensions that are asked for.
_DEFAULTS_WITHOUT: dict[str, dict[str, Any]] = {
    "transformer_engine": {
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,  # torch's RMSNorm has none
    },
    # The output layer is Megatron's own and needs Apex's kernel even beside Transformer Engine.
    "fused_weight_gradient_mlp_cuda": {"gradient_accumulation_fusion": False},
    "scaled_upper_triang_masked_softmax_cuda": {"masked_softmax_fusion": False},
}


def set_gpu_defaults(parser: argparse.ArgumentParser) -> None:
    """Give Megatron's flags defaults that what is installed can serve (no effect on a CPU)."""
    if cpu.is_cpu():
        return
    for module, defaults in _DEFAULTS_WITHOUT.items():
        if importlib.util.find_spec(module) is None:
            parser.set_defaults(**defaults)


def check_gpu_args(args: argparse.Namespace) -> None:
    """Refuse what Megatron's local layers cannot do.

    Raises:
        UserError: names the flag and the fix.
    """
    if cpu.is_cpu() or args.transformer_impl != "local":
        return
    refused = {
        "--context-parallel-size > 1": args.context_parallel_size > 1,
        "--sequence-parallel with --normalization RMSNorm": (
            args.sequence_parallel and args.normalization == "RMSNorm"
        ),
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"{flag} needs Transformer Engine, and --transformer-impl is local: install it "
                "(pip install 'megatron-pd[gpu]') or drop the flag."
            )

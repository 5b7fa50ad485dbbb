"""Run the unmodified Megatron stack on a machine that has no GPU.

Megatron says "cuda" throughout. `install()` makes every such word mean the CPU, once, before
Megatron is imported; with a GPU it changes nothing. Three layers, each as thin as it can be:

1. `_CudaMeansCpu`, a `TorchFunctionMode`: tensors asked for on a CUDA device are made on the CPU,
   and what a GPU would draw at random comes from `_GENERATOR`, so that the CPU's own generator,
   which weights and data orders come from, is left alone.
2. `_CUDA_FUNCTIONS`: what `torch.cuda` is asked about (devices, streams, memory, random numbers).
3. `set_cpu_defaults`: the Megatron flags whose defaults need a GPU get defaults that need none, so
   that one command line serves both; a flag given by the user always wins.

Written against torch 2.11.0 and megatron-core 0.19.2.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from megatron_pd.errors import UserError

__all__ = ["check_cpu_args", "chosen_device", "install", "is_cpu", "set_cpu_defaults"]

_CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


def chosen_device() -> Literal["cpu", "cuda"]:
    """The device by `MEGATRON_PD_DEVICE` (cpu | cuda | auto); nothing is prepared for it.

    Raises:
        UserError: an unknown device, or `cuda` where no GPU is visible.
    """
    if _mode is not None:
        return "cpu"
    device = os.environ.get("MEGATRON_PD_DEVICE", "auto")
    if device not in ("cpu", "cuda", "auto"):
        raise UserError(f"MEGATRON_PD_DEVICE={device!r} is unknown: use cpu, cuda or auto.")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError(
            "MEGATRON_PD_DEVICE=cuda, but torch sees no GPU: check the driver (nvidia-smi) and "
            "CUDA_VISIBLE_DEVICES, or use MEGATRON_PD_DEVICE=cpu."
        )
    return "cuda" if device == "cuda" or (device == "auto" and has_gpu) else "cpu"


def install() -> Literal["cpu", "cuda"]:
    """Prepare for the device that `chosen_device` names.

    Call before Megatron is imported. Calling again is harmless.

    Returns:
        "cuda" (nothing was replaced) or "cpu".
    Raises:
        UserError: as `chosen_device`.
    """
    global _mode
    if chosen_device() == "cuda":
        return "cuda"
    if _mode is not None:
        return "cpu"

    # Megatron compiles small functions with torch.compile, for which a CPU-only machine may have
    # no compiler and which would cost more than it saves at the sizes that a CPU can train.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = _CUDA_FUNCTIONS["get_rng_state"]
    torch.cuda.nvtx.range_push = _always(None)
    torch.cuda.nvtx.range_pop = _always(None)
    # DataLoader would start a pinning thread, and DDP would ask for the accelerator's streams.
    torch.accelerator.is_available = _always(False)
    torch.accelerator.current_device_index = _always(0)
    # PyTorch looks at the stream's type before it asks the mode.
    torch.Tensor.record_stream = _always(None)  # type: ignore[method-assign]
    _drop_device_id_of_init_process_group()
    # The processes that write checkpoints beside training start anew, from a server that imports
    # these; whether they come here through the main module depends on how that was started.
    multiprocessing.set_forkserver_preload(["__main__", f"{__package__}.cpu_child"])
    _mode = _CudaMeansCpu()
    _mode.__enter__()
    return "cpu"


def is_cpu() -> bool:
    """True once `install()` has chosen the CPU."""
    return _mode is not None


def set_cpu_defaults(parser: argparse.ArgumentParser) -> None:
    """Give Megatron's flags the defaults that work without a GPU (no effect with one)."""
    if is_cpu():
        parser.set_defaults(**_CPU_FLAG_DEFAULTS)


def check_cpu_args(args: argparse.Namespace) -> None:
    """Refuse what Megatron's local (non-Transformer-Engine) implementation cannot do on a CPU.

    Raises:
        UserError: names the flag and the fix.
    """
    if not is_cpu():
        return
    refused = {
        "--sequence-parallel": (args.sequence_parallel, "torch's LayerNorm refuses it"),
        "--context-parallel-size > 1": (
            args.context_parallel_size > 1,
            "it needs Transformer Engine's attention",
        ),
        "--transformer-impl transformer_engine": (
            args.transformer_impl == "transformer_engine",
            "Transformer Engine needs a GPU",
        ),
        "--distributed-backend nccl": (args.distributed_backend == "nccl", "NCCL needs a GPU"),
        "--fp8-format": (bool(args.fp8), "it needs a GPU's FP8 matrix units"),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise UserError(
                f"{flag} is not available on a CPU ({reason}): drop the flag, or run on a GPU."
            )


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors asked for on a CUDA device are made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_cuda = "device" in kwargs and _is_cuda(kwargs["device"])
        if on_cuda:
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.")
        if func in _DROPOUT or (on_cuda and func in _RANDOM_FACTORIES):
            with _drawing_from_generator():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


_GENERATOR = torch.Generator()
"""The generator of "cuda". Nothing but what a GPU draws at random moves it: tensors of random
numbers that are asked for there, and dropout, which only training steps have."""

_RANDOM_FACTORIES = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
_DROPOUT = {F.dropout, F.alpha_dropout, F.scaled_dot_product_attention, torch.dropout}


@contextlib.contextmanager
def _drawing_from_generator() -> Iterator[None]:
    """What draws from the CPU's generator draws from "cuda"'s."""
    own = torch.get_rng_state()
    torch.set_rng_state(_GENERATOR.get_state())
    try:
        yield
    finally:
        _GENERATOR.set_state(torch.get_rng_state())
        torch.set_rng_state(own)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return type(device) is int  # a bare device index; bool is no index


class _Stream:
    """A CUDA stream on a device whose work is done when the call returns."""

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, *args): ...
    def wait_event(self, *args): ...
    def synchronize(self): ...
    def record_event(self, *args) -> "_Event":
        return _Event()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class _Event:
    """A CUDA event that has always happened already."""

    def __init__(self, *args, **kwargs): ...
    def record(self, *args): ...
    def wait(self, *args): ...
    def synchronize(self): ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def _always(value: Any) -> Callable[..., Any]:
    """A new function each time: torch._dynamo refuses one object under two names."""
    return lambda *args, **kwargs: value


_CUDA_FUNCTIONS: dict[str, Any] = {
    # There is a device, and it is number 0 for every rank. Megatron compares the local rank with
    # the count, and refuses to start where there are fewer devices than ranks.
    "is_available": _always(True),
    "is_initialized": _always(True),
    "device_count": lambda: max(8, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    "current_device": _always(0),
    "set_device": _always(None),
    "get_device_name": _always("cpu"),
    # Compute capability 0.0: every fused kernel that asks for an architecture stays off.
    "get_device_capability": _always((0, 0)),
    "get_device_properties": _always(
        types.SimpleNamespace(
            name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=1 << 34
        )
    ),
    # Work is finished when the call returns.
    "synchronize": _always(None),
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda *args: _Stream(),
    "default_stream": lambda *args: _Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "is_current_stream_capturing": _always(False),
    # There is nothing to measure: `--log-straggler` asks for these.
    "temperature": _always(0),
    "power_draw": _always(0),
    "utilization": _always(0),
    "clock_rate": _always(0),
    # The caching allocator has nothing cached.
    "empty_cache": _always(None),
    "memory_allocated": _always(0),
    "max_memory_allocated": _always(0),
    "memory_reserved": _always(0),
    "max_memory_reserved": _always(0),
    "reset_peak_memory_stats": _always(None),
    "memory_stats": lambda *args: collections.defaultdict(int),
    "device_memory_used": _always(0),
    "default_generators": (_GENERATOR,),
    "manual_seed": lambda seed: _GENERATOR.manual_seed(seed),
    "manual_seed_all": lambda seed: _GENERATOR.manual_seed(seed),
    "get_rng_state": lambda *args, **kwargs: _GENERATOR.get_state(),
    "set_rng_state": lambda state, device="cuda": _GENERATOR.set_state(state),
    "_lazy_init": _always(None),
    "_lazy_call": lambda call, **kwargs: call(),
    # The legacy tensor constructors that Megatron's fp32 <-> fp16 conversions compare against.
    "FloatTensor": torch.FloatTensor,
    "HalfTensor": torch.HalfTensor,
    "BFloat16Tensor": torch.BFloat16Tensor,
    "LongTensor": torch.LongTensor,
    "IntTensor": torch.IntTensor,
    "ByteTensor": torch.ByteTensor,
}

_CPU_FLAG_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}


def _drop_device_id_of_init_process_group() -> None:
    """Megatron binds the process group to its CUDA device; gloo refuses the argument."""
    original: Callable[..., Any] = torch.distributed.init_process_group

    def init_process_group(*args, **kwargs):
        kwargs.pop("device_id", None)
        return original(*args, **kwargs)

    torch.distributed.init_process_group = init_process_group

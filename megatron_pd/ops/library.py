"""Loads the compiled operators `torch.ops.megatron_pd.*` and tells torch their shapes.

The CPU library defines the operators; the CUDA library, built where nvcc was found, adds kernels to
them. Legend: S, B leading dimensions of the logits; T = S·B rows; V this rank's
vocabulary; K ids per row; N temperatures of each row.
"""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["has_cuda_kernels", "operators"]

_FOLDER = Path(__file__).parent
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_CPU_LIBRARY = _FOLDER / f"_operators{_SUFFIX}"
_CUDA_LIBRARY = _FOLDER / f"_operators_cuda{_SUFFIX}"
_TORCH_VERSION = _FOLDER / "_operators.torch"
_HOW_TO_BUILD = (
    "`make build`, or `pip install --no-build-isolation --force-reinstall --no-deps .` in the "
    "project's folder"
)


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library} doesn't load with torch {torch.__version__}. Build it again: "
            f"{_HOW_TO_BUILD}. The loader said: {error}"
        ) from error


def _load_libraries() -> None:
    for file in (_CPU_LIBRARY, _TORCH_VERSION):
        if not file.exists():
            raise ImportError(
                f"The compiled operators of megatron_pd aren't built: {file} is missing. Build "
                f"them: {_HOW_TO_BUILD}."
            )
    built_with = _TORCH_VERSION.read_text()
    if _release(built_with) != _release(torch.__version__):
        raise ImportError(
            f"{_CPU_LIBRARY} was built against torch {built_with}, and this is torch "
            f"{torch.__version__}, which it can't run with. Build it again: {_HOW_TO_BUILD}."
        )
    _load(_CPU_LIBRARY)
    if has_cuda_kernels():
        _load(_CUDA_LIBRARY)


def _release(version: str) -> list[str]:
    """["2", "11"] for "2.11.0+cu130": torch's C++ interface changes between minor versions."""
    return version.split(".")[:2]


_HAS_CUDA_KERNELS = _CUDA_LIBRARY.exists() and torch.version.cuda is not None


def has_cuda_kernels() -> bool:
    """Whether the CUDA kernels were built with this installation."""
    return _HAS_CUDA_KERNELS


_load_libraries()
operators = torch.ops.megatron_pd


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("megatron_pd::sparse_log_softmax_forward")
def _forward_shapes(
    logits_SBV: Tensor, ids_TK: Tensor, temperatures_TN: Tensor, first_id: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    rows, count = ids_TK.shape
    dtype = _accumulation_dtype(logits_SBV)
    return logits_SBV.new_empty(rows, dtype=dtype), logits_SBV.new_empty(
        rows, temperatures_TN.shape[1] + count, dtype=dtype
    )


@torch.library.register_fake("megatron_pd::sparse_log_softmax_backward")
def _backward_shapes(logits_SBV: Tensor, *_: Tensor | int) -> Tensor:
    return logits_SBV.new_empty(logits_SBV.shape)


@torch.library.register_fake("megatron_pd::sparse_log_softmax_backward_")
def _backward_in_place_shapes(logits_SBV: Tensor, *_: Tensor | int) -> None:
    return None


@torch.library.register_fake("megatron_pd::top_k")
def _top_k_shapes(
    logits_SBV: Tensor, k: int, first_id: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    shape = (logits_SBV.shape[0] * logits_SBV.shape[1], k)
    values_TK = logits_SBV.new_empty(shape, dtype=_accumulation_dtype(logits_SBV))
    return values_TK, logits_SBV.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("megatron_pd::log_prob_sums")
def _log_prob_sums_shapes(
    logits_SBV: Tensor, lse_T: Tensor, first_id: int, vocab_size: int
) -> Tensor:
    return lse_T.new_empty((*lse_T.shape, 3), dtype=torch.float64)


@torch.library.register_fake("megatron_pd::row_divergence")
def _row_divergence_shapes(
    log_q_TK: Tensor, *_: Tensor | str | float
) -> tuple[Tensor, Tensor, Tensor]:
    loss_T = log_q_TK.new_empty(log_q_TK.shape[0])
    return loss_T, log_q_TK.new_empty(log_q_TK.shape), torch.empty_like(loss_T)

"""Pre-training distillation (arXiv 2410.16215) for unmodified Megatron.

What a user imports; each name is loaded when it is first used, so that reading a store needs no
torch and nothing here needs Megatron.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_pd.distill.config import PDConfig
    from megatron_pd.distill.objective import distillation_loss
    from megatron_pd.distill.targets import TeacherTargets
    from megatron_pd.ops import sparse_log_softmax
    from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows

__version__ = "0.1.0"

__all__ = [
    "LogitStore",
    "LogitStoreWriter",
    "PDConfig",
    "TeacherRows",
    "TeacherTargets",
    "distillation_loss",
    "sparse_log_softmax",
]

_MODULE_OF = {
    "LogitStore": "megatron_pd.store",
    "LogitStoreWriter": "megatron_pd.store",
    "PDConfig": "megatron_pd.distill.config",
    "TeacherRows": "megatron_pd.store",
    "TeacherTargets": "megatron_pd.distill.targets",
    "distillation_loss": "megatron_pd.distill.objective",
    "sparse_log_softmax": "megatron_pd.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])

"""The logit store: a teacher's sparse distributions, addressed by (document, token offset)."""

from megatron_pd.store.reader import LogitStore
from megatron_pd.store.types import Corpus, ShardInUseError, StoreError, TeacherRows
from megatron_pd.store.writer import LogitStoreWriter

__all__ = [
    "Corpus",
    "LogitStore",
    "LogitStoreWriter",
    "ShardInUseError",
    "StoreError",
    "TeacherRows",
]

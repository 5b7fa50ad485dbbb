"""The student's log-probabilities at chosen vocabulary ids, from one read of the logits."""

from megatron_pd.ops.reference import sparse_log_softmax_reference
from megatron_pd.ops.sparse_log_softmax import sparse_log_softmax

__all__ = ["sparse_log_softmax", "sparse_log_softmax_reference"]

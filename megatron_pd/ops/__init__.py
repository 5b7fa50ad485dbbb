"""The student's log-probabilities at chosen vocabulary ids, and the rows' loss on them."""

from megatron_pd.ops.reference import sparse_log_softmax_reference
from megatron_pd.ops.row_divergence import FUSED_LOSSES, FUSED_TAILS, is_fused, row_divergence
from megatron_pd.ops.sparse_log_softmax import sparse_log_softmax

__all__ = [
    "FUSED_LOSSES",
    "FUSED_TAILS",
    "is_fused",
    "row_divergence",
    "sparse_log_softmax",
    "sparse_log_softmax_reference",
]

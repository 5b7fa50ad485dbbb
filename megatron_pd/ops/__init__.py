"""Log-probabilities at chosen vocabulary ids, the rows' loss on them, and what a row is kept by."""

from megatron_pd.ops.log_prob_sums import log_prob_sums
from megatron_pd.ops.reference import sparse_log_softmax_reference
from megatron_pd.ops.row_divergence import FUSED_LOSSES, FUSED_TAILS, is_fused, row_divergence
from megatron_pd.ops.sparse_log_softmax import sparse_log_softmax, sparse_log_softmaxes
from megatron_pd.ops.top_k import top_k

__all__ = [
    "FUSED_LOSSES",
    "FUSED_TAILS",
    "is_fused",
    "log_prob_sums",
    "row_divergence",
    "sparse_log_softmax",
    "sparse_log_softmax_reference",
    "sparse_log_softmaxes",
    "top_k",
]

// The operator's schema; megatron_pd/ops/row_divergence.py says what it is for.
//
//   log_q        [T, K]       float32|float64, last stride 1; full-vocabulary log-probabilities
//   label_log_q  [T]          the same of the labels
//   ids          [T, K]       int32
//   log_t        [T, K]       the teacher's, at temperature 1
//   counts       [T]          int32, entries of each row; they are its first columns
//   labels       [T]          int64
//   temperature  [T]          the teacher's
//   loss         [T]
//   grad_log_q   [T, K], grad_label_log_q [T]   of each row's own loss
//
// All but ids, counts and labels have the dtype of log_q.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(megatron_pd, library) {
  library.def(
      "row_divergence(Tensor log_q, Tensor label_log_q, Tensor ids, Tensor log_t, Tensor counts, "
      "Tensor labels, Tensor temperature, str tail, str loss, str weight, float beta) -> "
      "(Tensor loss, Tensor grad_log_q, Tensor grad_label_log_q)");
}

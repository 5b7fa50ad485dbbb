// The operators' schemas; megatron_pd/ops/sparse_log_softmax.py says what they are for.
//
//   logits       [S, B, V]    float64|float32|bfloat16|float16, last stride 1; T = S·B rows
//   ids          [T, K]       int32|int64 global ids, −1 = padding
//   temperatures [1, N] or [T, N]   N = 1 or 2, for all rows or for each
//   max          [T]          largest raw logit of the row's true vocabulary ids
//   sums         [T, N+K]     Σ exp((z − max)/temperature) of each, then the raw logits at `ids`
//   grad_logq    [T, N, K]    gradient of the log-probabilities at each temperature
//   grad_lse     [T, N]       of the log-sum-exps
//
//   values       [T, K]       the top K logits of the row's true vocabulary ids, −∞ beyond them
//   top_ids      [T, K]       int32, their global ids, −1 beyond them; the lower id first of equals
//   log_prob_sums [T, 3]      float64: Σ p·log p, Σ log p and Σ (log p)² of the row's true
//   vocabulary
//                             ids, with log p = z − lse
//
// values, max, sums, temperatures and the gradients of logq and lse are float32 (float64 for
// float64 logits). `sparse_log_softmax_backward_` writes the gradient over the logits.
#include <torch/library.h>

TORCH_LIBRARY(megatron_pd, library) {
  library.def(
      "sparse_log_softmax_forward(Tensor logits, Tensor ids, Tensor temperatures, SymInt "
      "first_id, SymInt vocab_size) -> (Tensor max, Tensor sums)");
  library.def(
      "sparse_log_softmax_backward(Tensor logits, Tensor ids, Tensor temperatures, Tensor max, "
      "Tensor sums, Tensor grad_logq, Tensor grad_lse, SymInt first_id, SymInt vocab_size) -> "
      "Tensor");
  library.def(
      "sparse_log_softmax_backward_(Tensor(a!) logits, Tensor ids, Tensor temperatures, Tensor "
      "max, "
      "Tensor sums, Tensor grad_logq, Tensor grad_lse, SymInt first_id, SymInt vocab_size) -> ()");
  library.def(
      "top_k(Tensor logits, int k, SymInt first_id, SymInt vocab_size) -> (Tensor values, Tensor "
      "top_ids)");
  library.def(
      "log_prob_sums(Tensor logits, Tensor lse, SymInt first_id, SymInt vocab_size) -> Tensor");
}

// The operator on the CPU: rows are shared out over threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../operators.h"

namespace megatron_pd {
namespace {

struct OneThread {
  static int64_t lane() { return 0; }
  static int64_t size() { return 1; }
  template <class Number>
  static Number sum(Number own) {
    return own;
  }
  template <class Number>
  static Number max(Number own) {
    return own;
  }
};

constexpr int64_t kEntriesPerTask = 4096;  // some 50 μs, worth a thread's wake-up

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_divergence(
    const at::Tensor& log_q, const at::Tensor& label_log_q, const at::Tensor& ids,
    const at::Tensor& log_t, const at::Tensor& counts, const at::Tensor& labels,
    const at::Tensor& temperature, c10::string_view tail, c10::string_view loss,
    c10::string_view weight, double beta) {
  const RowTensors in{log_q, label_log_q, ids, log_t, counts, labels, temperature};
  in.check();
  const auto out = in.outputs();
  const auto solve = [&](auto number) {
    using Number = decltype(number);
    const auto divergence = divergence_named<Number>(tail, loss, weight, beta);
    const RowProblem<Number> problem = problem_of<Number>(in, out);
    const int64_t grain = kEntriesPerTask / (1 + problem.columns) + 1;
    at::parallel_for(0, problem.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) problem.solve_row(OneThread(), divergence, row);
    });
  };
  log_q.scalar_type() == at::kDouble ? solve(double()) : solve(float());
  return out;
}

}  // namespace
}  // namespace megatron_pd

TORCH_LIBRARY_IMPL(megatron_pd, CPU, library) {
  library.impl("row_divergence", &megatron_pd::row_divergence);
}

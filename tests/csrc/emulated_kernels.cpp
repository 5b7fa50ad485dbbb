// The CUDA kernels compiled for the host, with a C interface for
// tests/csrc/test_emulated_kernels.py.
#include "cuda_emulator.h"

#include "../../csrc/row_divergence/cuda/kernel.cuh"
#include "../../csrc/sparse_log_softmax/cuda/kernels.cuh"

namespace {

using megatron_pd::BackwardArguments;
using megatron_pd::ForwardArguments;
using megatron_pd::LogitType;

// Fewer than on a GPU: a row then takes a thread through all its loops at sizes quick to emulate.
constexpr int kThreads = 64;

template <class Logit, int kEach>
void forward_of(const ForwardArguments& in, unsigned rows, bool reversed) {
  const auto parts = static_cast<unsigned>(in.parts);
  emulator::launch({rows, parts}, kThreads, reversed,
                   [&] { megatron_pd::forward_kernel<Logit, kThreads, kEach>(in); });
  emulator::launch({rows, 1}, kThreads, reversed,
                   [&] { megatron_pd::finish_kernel<Logit, kThreads, kEach>(in); });
}

template <class Logit, int kEach>
void backward_of(const BackwardArguments& in, unsigned rows, bool reversed) {
  const auto parts = static_cast<unsigned>(in.parts);
  emulator::launch({rows, parts}, kThreads, reversed,
                   [&] { megatron_pd::backward_kernel<Logit, kThreads, kEach>(in); });
}

template <class Logit>
void forward(const ForwardArguments& in, unsigned rows, bool reversed) {
  in.temperatures.count == 1 ? forward_of<Logit, 1>(in, rows, reversed)
                             : forward_of<Logit, 2>(in, rows, reversed);
}

template <class Logit>
void backward(const BackwardArguments& in, unsigned rows, bool reversed) {
  in.temperatures.count == 1 ? backward_of<Logit, 1>(in, rows, reversed)
                             : backward_of<Logit, 2>(in, rows, reversed);
}

}  // namespace

extern "C" {

void emulate_forward(int type, const ForwardArguments* arguments, unsigned rows, bool reversed) {
  switch (static_cast<LogitType>(type)) {
    case LogitType::kFloat32:
      return forward<megatron_pd::Float32Logit>(*arguments, rows, reversed);
    case LogitType::kBFloat16:
      return forward<megatron_pd::BFloat16Logit>(*arguments, rows, reversed);
    case LogitType::kFloat16:
      return forward<megatron_pd::Float16Logit>(*arguments, rows, reversed);
  }
}

void emulate_backward(int type, const BackwardArguments* arguments, unsigned rows, bool reversed) {
  switch (static_cast<LogitType>(type)) {
    case LogitType::kFloat32:
      return backward<megatron_pd::Float32Logit>(*arguments, rows, reversed);
    case LogitType::kBFloat16:
      return backward<megatron_pd::BFloat16Logit>(*arguments, rows, reversed);
    case LogitType::kFloat16:
      return backward<megatron_pd::Float16Logit>(*arguments, rows, reversed);
  }
}

void emulate_row_divergence(const megatron_pd::Divergence<float>& divergence,
                            const megatron_pd::RowProblem<float>& problem, bool reversed) {
  constexpr unsigned kRowsPerBlock = kThreads / megatron_pd::kWarpSize;
  const auto blocks = static_cast<unsigned>((problem.rows + kRowsPerBlock - 1) / kRowsPerBlock);
  emulator::launch({blocks, 1}, kThreads, reversed,
                   [&] { megatron_pd::row_divergence_kernel<kThreads>(divergence, problem); });
}

uint16_t emulate_narrow(int type, float x) {
  return static_cast<LogitType>(type) == LogitType::kBFloat16 ? megatron_pd::bfloat16_of_float(x)
                                                              : megatron_pd::float16_of_float(x);
}

float emulate_widen(int type, uint16_t bits) {
  return static_cast<LogitType>(type) == LogitType::kBFloat16 ? megatron_pd::float_of_bfloat16(bits)
                                                              : megatron_pd::float_of_float16(bits);
}

// Kernels with mistakes that the emulator has to see, one for each number.
void emulate_mistake(int number) {
  emulator::launch({1, 1}, 64, false, [=] {
    if (number == 0 && threadIdx.x < 40) __syncthreads();
    if (number == 1 && threadIdx.x % 2 == 0) __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  });
}

// Every thread tells its number to the block through shared memory without a barrier: what thread
// 0 reads depends on the order of the threads, which is how a race shows.
float emulate_race(bool reversed) {
  static float result;
  emulator::launch({1, 1}, 64, reversed, [] {
    __shared__ float last;
    last = static_cast<float>(threadIdx.x);
    if (threadIdx.x == 0) result = last;
    __syncthreads();
    if (threadIdx.x == 1) result += last / 100;
  });
  return result;
}

}  // extern "C"

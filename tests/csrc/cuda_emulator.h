// Runs CUDA kernels on the CPU, to test them where there is no GPU.
//
// The threads of a block are fibers on one OS thread, blocks run one after another. A fiber runs
// until it reaches __syncthreads or a warp shuffle, and waits there for the others, so every order
// that a barrier enforces is kept, and what no barrier enforces runs in an order the caller picks:
// with `reversed` the blocks and the threads of a block take their turns backwards. A kernel whose
// result depends on that has a race.
//
// A barrier that only some threads of a block reach, or a shuffle that only some lanes of a warp
// reach, aborts with a message. Shared memory is static, so it carries over from block to block as
// uninitialised memory would. Addresses are checked by the sanitizers, which are told about fibers.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Index {
  unsigned x = 0, y = 0;
};

enum class Wait { kNothing, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNothing;
  void* sanitizer_stack = nullptr;
};

constexpr size_t kStackSize = 64 * 1024;
constexpr unsigned kWarp = 32;

class Block {
 public:
  explicit Block(unsigned threads) : threads_(threads), slots_(threads) {}

  void run(const std::function<void()>& kernel, bool reversed) {
    kernel_ = &kernel;
    fibers_ = std::vector<Fiber>(threads_);
    for (unsigned t = 0; t < threads_; ++t) start(t);
    for (unsigned done = 0; done < threads_;) {
      done = 0;
      bool progress = false;
      for (unsigned i = 0; i < threads_; ++i) {
        const unsigned t = reversed ? threads_ - 1 - i : i;
        if (fibers_[t].wait == Wait::kNothing) {
          resume(t);
          progress = true;
        }
        done += fibers_[t].wait == Wait::kDone;
      }
      progress |= release();
      if (!progress && done < threads_) fail("a barrier or shuffle that not all threads reach");
    }
  }

  void wait(Wait what) {
    fibers_[current_].wait = what;
    leave(false);
  }

  // Every lane's value to the lane with its number changed by `mask`.
  float exchange(float value, unsigned mask) {
    const unsigned own = current_;
    slots_[own] = value;
    wait(Wait::kWarp);
    const float received = slots_[own ^ mask];
    wait(Wait::kWarp);  // nobody writes the next value before all have read this one
    return received;
  }

  unsigned current() const { return current_; }

 private:
  static void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulator: %s\n", what);
    std::abort();
  }

  static void enter() { active->body(); }

  void body() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
    (*kernel_)();
    fibers_[current_].wait = Wait::kDone;
    leave(true);
  }

  void start(unsigned t) {
    Fiber& fiber = fibers_[t];
    fiber.stack.reset(new char[kStackSize]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackSize;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  void resume(unsigned t) {
    current_ = t;
    active = this;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fibers_[t].stack.get(), kStackSize);
#endif
    swapcontext(&scheduler_, &fibers_[t].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  // Back to the scheduler, for ever if the fiber has ended.
  void leave([[maybe_unused]] bool ended) {
    Fiber& fiber = fibers_[current_];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ended ? nullptr : &fiber.sanitizer_stack, scheduler_bottom_,
                                   scheduler_size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  bool all_wait(unsigned from, unsigned to, Wait what) const {
    for (unsigned t = from; t < to; ++t) {
      if (fibers_[t].wait != what) return false;
    }
    return true;
  }

  // Lets on whom all that belong to the barrier have joined.
  bool release() {
    bool released = false;
    const auto let_on = [&](unsigned from, unsigned to, Wait what) {
      if (!all_wait(from, to, what)) return;
      for (unsigned t = from; t < to; ++t) fibers_[t].wait = Wait::kNothing;
      released = true;
    };
    for (unsigned first = 0; first < threads_; first += kWarp)
      let_on(first, first + kWarp, Wait::kWarp);
    let_on(0, threads_, Wait::kBlock);
    return released;
  }

  static inline Block* active = nullptr;

  unsigned threads_;
  unsigned current_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<float> slots_;
  ucontext_t scheduler_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

inline Block* block = nullptr;
inline Index block_index;

inline void launch(Index blocks, unsigned threads, bool reversed,
                   const std::function<void()>& kernel) {
  Block emulated(threads);
  block = &emulated;
  for (unsigned b = 0; b < blocks.x * blocks.y; ++b) {
    const unsigned turn = reversed ? blocks.x * blocks.y - 1 - b : b;
    block_index = {turn % blocks.x, turn / blocks.x};
    emulated.run(kernel, reversed);
  }
  block = nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::block->current(), 0})
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::block->wait(emulator::Wait::kBlock); }
inline float __shfl_xor_sync(unsigned lanes, float value, int mask) {
  if (lanes != 0xffffffffu) std::abort();
  return emulator::block->exchange(value, static_cast<unsigned>(mask));
}

namespace megatron_pd {

using std::exp2f;
using std::fmaxf;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float float_of_bfloat16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float float_of_float16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}
inline uint16_t float16_of_float(float x) {
  const uint16_t sign = static_cast<uint16_t>((bits_of(x) >> 16) & 0x8000u);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = size > 0 ? std::ilogb(size) : -24;
  if (exponent < -14) exponent = -14;
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  // `steps` counts in units of the last place; 2048 carries into the exponent by itself.
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + steps));
}

}  // namespace megatron_pd

// As much of CUDA's runtime as the kernels in csrc/cuda use, on the CPU: blocks run one after the
// other, their threads as fibers that take turns at __syncthreads. What a GPU does in any order
// happens here in one of two, ascending or descending threads: results must not tell which.
#pragma once

#include <sanitizer/asan_interface.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__  // a declaration of the array that the program defines and lists below
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr unsigned kMaxGridRows = 65535;

// The arrays that kernels declare as extern __shared__; a launch may use its first bytes.
struct SharedArray {
  void* data;
  size_t bytes;
};
inline std::vector<SharedArray> shared_arrays;
inline bool descending = false;  // the order in which threads run between two barriers

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

// A place to go on from: a stack with what its code needs to return from `switch_to`.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};

// Saves where it was called from and goes on where `to` was. swapcontext does that with two system
// calls, which take most of the tests' time.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.pushsection .text
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");

inline void switch_to(Context& from, const Context& to) {
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
}

inline void start_at(Context& context, char* stack, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where the function would return to
  *--top = reinterpret_cast<void*>(function);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
#else
using Context = ucontext_t;

inline void switch_to(Context& from, const Context& to) {
  swapcontext(&from, &to);
}

inline void start_at(Context& context, char* stack, void (*function)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, function, 0);
}
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // aligned to 16 bytes
  bool finished = false;
};

inline Context scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running = nullptr;
inline const std::function<void()>* body = nullptr;

inline void enter() {
  (*body)();
  running->finished = true;
  switch_to(running->context, scheduler);
}

inline void run_block(const std::function<void()>& kernel) {
  const unsigned threads = blockDim.x * blockDim.y;
  body = &kernel;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->finished = false;
    start_at(fibers[i]->context, fibers[i]->stack.get(), enter);
  }
  for (unsigned finished = 0; finished == 0;) {
    for (unsigned n = 0; n < threads; ++n) {
      const unsigned i = descending ? threads - 1 - n : n;
      running = fibers[i].get();
      threadIdx = dim3(i % blockDim.x, i / blockDim.x, 0);
      switch_to(scheduler, running->context);
      finished += running->finished;
    }
    if (finished != 0 && finished != threads) fail("some threads ended, others wait at a barrier");
  }
}

inline void set_shared(size_t bytes) {
  for (const SharedArray& array : shared_arrays) {
    char* data = static_cast<char*>(array.data);
    ASAN_UNPOISON_MEMORY_REGION(data, array.bytes);
    std::memset(data, 0xff, array.bytes);  // NaN: nothing may count on what was there
    const size_t usable = bytes <= array.bytes ? bytes : 0;  // else it is not the launch's array
    ASAN_POISON_MEMORY_REGION(data + usable, array.bytes - usable);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  cuda_on_cpu::switch_to(cuda_on_cpu::running->context, cuda_on_cpu::scheduler);
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  using namespace cuda_on_cpu;
  if (grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffffu || grid.y > kMaxGridRows ||
      block.x * block.y == 0 || block.x * block.y > kMaxThreads || shared > kMaxSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  const auto& argument = *static_cast<std::remove_const_t<Arguments>*>(arguments[0]);
  const std::function<void()> thread = [&] { kernel(argument); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      set_shared(shared);
      run_block(thread);
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

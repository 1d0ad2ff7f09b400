// Scratch memory of the CPU ops, and the integer arithmetic of cutting work into pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__unix__)
#include <sys/mman.h>
#endif

namespace resfast {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Uninitialised memory on a cache line; where it is large, on huge pages: one entry of the
// processor's page table then reaches 2 MiB instead of 4 KiB. For std::free.
inline void* allocate(int64_t bytes) {
  constexpr int64_t kLine = 64, kHugePage = 2 * 1024 * 1024;
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : kLine;
  void* const data = std::aligned_alloc(alignment, round_up(bytes, alignment));
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // a wish: may fail
  if (alignment == kHugePage) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return data;
}

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : data_(allocate(bytes)) {}
  char* get() const { return static_cast<char*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory of the calling thread for the length of one op: kept, since memory fresh from the system
// costs a page fault per 4 KiB. The next call on this thread for the same slot returns the same.
template <int kSlot = 0>
float* thread_scratch(int64_t floats) {
  static thread_local Buffer buffer;
  static thread_local int64_t size = 0;
  if (size < floats) {
    buffer = Buffer();  // freed before the larger one is taken
    size = 0;
    buffer = Buffer(floats * static_cast<int64_t>(sizeof(float)));
    size = floats;
  }
  return reinterpret_cast<float*>(buffer.get());
}

// A slot for what an op's threads share, in the memory of the thread that calls the op.
constexpr int kShared = 1;

}  // namespace resfast

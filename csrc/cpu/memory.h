// Scratch memory of the CPU ops, and the integer arithmetic of cutting work into pieces.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace resfast {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Uninitialised memory on a cache line.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : data_(std::aligned_alloc(64, round_up(bytes, 64))) {
    if (!data_) throw std::bad_alloc();
  }
  char* get() const { return static_cast<char*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory of the calling thread for the length of one op: kept, since memory fresh from the system
// costs a page fault per 4 KiB. The next call on this thread returns the same.
inline float* thread_scratch(int64_t floats) {
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

}  // namespace resfast

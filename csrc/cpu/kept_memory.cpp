// Memory of large activations: kept when its tensor dies, for the next of about that size.
//
// malloc returns large blocks to the system at once and gets them back page by page, each zeroed
// when it is first written: that costs more than the kernels that fill them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__)
#include <pthread.h>
#endif

#include "checks.h"
#include "cpu/memory.h"

namespace resfast {
namespace {

constexpr int64_t kGrain = 64 * 1024;

struct Block {
  void* data;
  int64_t bytes;
};

// Blocks in use and idle together stay within 5/4 of the most that was ever in use.
class Pool {
 public:
  Block take(int64_t wanted) {
    const int64_t bytes = round_up(wanted, kGrain);
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto i = idle_.begin(); i != idle_.end(); ++i) {
      if (i->bytes < bytes || i->bytes > bytes + bytes / 4) continue;
      if (best == idle_.end() || i->bytes < best->bytes) best = i;
    }
    Block block{nullptr, bytes};
    if (best != idle_.end()) {
      block = *best;
      idle_.erase(best);
      idle_bytes_ -= block.bytes;
    }
    most_ = std::max(most_, used_bytes_ + block.bytes);
    if (!block.data) {
      shrink(most_ + most_ / 4 - used_bytes_ - bytes);
      block.data = allocate(bytes);
    }
    used_bytes_ += block.bytes;
    return block;
  }

  void give(Block block) noexcept {
    const std::lock_guard lock(mutex_);
    used_bytes_ -= block.bytes;
    try {
      idle_.push_back(block);
      idle_bytes_ += block.bytes;
    } catch (const std::bad_alloc&) {
      std::free(block.data);
    }
  }

  // Frees what is idle, and forgets how much was ever in use. Returns the bytes freed.
  int64_t release() {
    const std::lock_guard lock(mutex_);
    const int64_t freed = idle_bytes_;
    shrink(0);
    most_ = used_bytes_;
    return freed;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Frees idle blocks, those idle longest first, down to so many bytes.
  void shrink(int64_t bytes) {
    auto i = idle_.begin();
    for (; i != idle_.end() && idle_bytes_ > bytes; ++i) {
      idle_bytes_ -= i->bytes;
      std::free(i->data);
    }
    idle_.erase(idle_.begin(), i);
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  int64_t idle_bytes_ = 0, used_bytes_ = 0, most_ = 0;
};

// Never destroyed: tensors may die after everything else.
Pool& pool() {
  static Pool* const instance = [] {
    auto* const made = new Pool;
#if defined(__unix__)
    // a forked process must not inherit a lock that a thread it does not have holds
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                   [] { pool().mutex().unlock(); });
#endif
    return made;
  }();
  return *instance;
}

// An uninitialised channels_last tensor [n, c, h, w] of like's dtype.
Tensor empty_kept(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  check_cpu(like, "like");
  STD_TORCH_CHECK(n >= 0 && c >= 0 && h >= 0 && w >= 0, "sizes must not be negative, got [", n,
                  ", ", c, ", ", h, ", ", w, "]");
  const Block block =
      pool().take(std::max<int64_t>(1, n * c * h * w) * static_cast<int64_t>(like.element_size()));
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides{h * w * c, 1, w * c, c};
  try {
    return torch::stable::from_blob(block.data, {sizes.data(), sizes.size()},
                                    {strides.data(), strides.size()}, like.device(),
                                    like.scalar_type(), [block](void*) { pool().give(block); });
  } catch (...) {
    pool().give(block);
    throw;
  }
}

int64_t release_kept() {
  return pool().release();
}

}  // namespace
}  // namespace resfast

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("empty_kept", TORCH_BOX(&resfast::empty_kept));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("release_kept", TORCH_BOX(&resfast::release_kept));
}

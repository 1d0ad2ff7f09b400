// Work shared out to the threads as they get on. Cores differ: some are built slower, and one whose
// core serves somebody else too, as on most rented machines, takes up to twice as long. Where each
// thread has a fixed part, all wait for the slowest.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/memory.h"

namespace resfast {

// call(first, last) on all of [begin, end) in pieces of at least `grain`. Each thread starts on a
// part of its own, the same at every call, so that what it wrote may still be in its caches; and
// goes on with what is left of the others'.
template <class Call>
void share_out(int64_t begin, int64_t end, int64_t grain, const Call& call) {
  constexpr int64_t kPieces = 8;  // of a thread's part
  const int64_t count = end - begin;
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(count, grain));
  if (threads <= 1) {
    if (count > 0) call(begin, end);
    return;
  }
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Part> parts(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i) {
    parts[i].next = begin + count * i / threads;
    parts[i].end = begin + count * (i + 1) / threads;
  }
  const int64_t piece = std::max(grain, count / (threads * kPieces));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t i = 0; i < threads; ++i) {
        Part& part = parts[(thread + i) % threads];
        for (;;) {
          const int64_t at = part.next.fetch_add(piece, std::memory_order_relaxed);
          if (at >= part.end) break;
          call(at, std::min(at + piece, part.end));
        }
      }
    }
  });
}

}  // namespace resfast

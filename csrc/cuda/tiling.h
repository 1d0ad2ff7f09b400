// How an [m, c] activation is shared out among blocks of threads: plain arithmetic, for any host.
#pragma once

#include <algorithm>
#include <cstdint>

namespace resfast::cuda {

constexpr int kWide = 8;               // channels of a thread: a byte of a bit mask
constexpr int kThreads = 256;          // of a block
constexpr int kHeldThreads = 512;      // of a block that holds all its pixels
constexpr int64_t kHeldPixels = 1024;  // that such a block holds at most
constexpr int64_t kHeldBytes = 32;     // of its channels: the least that memory hands out
constexpr int64_t kMaxTiles = 512;     // of a reduction: what one merge takes in
constexpr int64_t kMaxGridRows = 65535;

// A block is threads_c * lanes channels by `rows` pixels, threads_m of them at a time.
struct Tiling {
  int lanes;  // kWide, read 16 bytes at a time, or 1
  int threads_c, threads_m;
  int64_t blocks_c, tiles, rows;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int power_of_two_from(int64_t n, int64_t most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

// Channels that a thread takes at a time; `aligned`: all activations start at 16 bytes.
inline int lanes_of(int64_t c, bool aligned) {
  return aligned && c % kWide == 0 ? kWide : 1;
}

// Rows of up to 256 channels; as many tiles of pixels as make `blocks` blocks, `most` at most.
inline Tiling tiling_of(int64_t m, int64_t c, int lanes, int64_t blocks, int64_t most) {
  Tiling t{};
  t.lanes = lanes;
  t.threads_c = power_of_two_from(ceil_div(c, lanes), 32);
  t.threads_m = kThreads / t.threads_c;
  t.blocks_c = ceil_div(c, static_cast<int64_t>(t.threads_c) * lanes);
  const int64_t wanted = std::clamp<int64_t>(blocks / t.blocks_c, 1, most);
  t.rows = ceil_div(ceil_div(m, wanted), t.threads_m) * t.threads_m;
  t.tiles = ceil_div(m, t.rows);
  return t;
}

// Four blocks to each multiprocessor, so that some compute while others wait for memory.
inline Tiling reduction_tiling(int64_t m, int64_t c, int lanes, int processors) {
  return tiling_of(m, c, lanes, int64_t{4} * processors, kMaxTiles);
}

// No merge follows: more blocks, so that the last ones to run leave less of the chip idle.
inline Tiling elementwise_tiling(int64_t m, int64_t c, int lanes, int processors) {
  return tiling_of(m, c, lanes, int64_t{32} * processors, kMaxGridRows);
}

// One block to kHeldBytes of channels, with all their pixels.
inline Tiling held_tiling(int64_t m, int64_t c, int lanes, int64_t element_size) {
  Tiling t{};
  t.lanes = lanes;
  t.threads_c = static_cast<int>(kHeldBytes / element_size / lanes);
  t.threads_m = power_of_two_from(m, kHeldThreads / t.threads_c);
  t.blocks_c = ceil_div(c, kHeldBytes / element_size);
  t.tiles = 1;
  t.rows = m;
  return t;
}

}  // namespace resfast::cuda

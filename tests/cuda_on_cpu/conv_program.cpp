// Runs on the CPU what the convolutions for Hopper do with their accumulators: reads calls from
// standard input, answers with what they computed, float values both.
//
// A call is int64 numbers: 0 for the norm's end or 1 for statistics, then n values, or pixels and
// channels; whether there is a residual, a ReLU, and the sum behind it. CUTLASS itself, which hands
// the values over, is not here.
#include "cuda/conv.h"
#include "cuda/conv_epilogue.h"
#include "cuda/norm.cu"

namespace resfast::cuda {
namespace {

alignas(16) double scratch_double[kHeldThreads];
alignas(16) float scratch[kHeldThreads * kWide];

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) cuda_on_cpu::fail("the input ends within a call");
}

std::vector<float> read_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  read(values.data(), values.size() * sizeof(float));
  return values;
}

void write(const std::vector<float>& values) {
  std::fwrite(values.data(), sizeof(float), values.size(), stdout);
}

void run_finish(int64_t n, bool has_residual, const Finish& f) {
  const auto z = read_floats(n), mean = read_floats(n), scale = read_floats(n);
  const auto beta = read_floats(n), residual = read_floats(n);
  std::vector<float> y(z.size());
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] = has_residual ? finish(z[i], mean[i], scale[i], beta[i], residual[i], f)
                        : finish(z[i], mean[i], scale[i], beta[i], f);
  }
  write(y);
}

// As the node of the visitor tree does it: a tile's columns in pieces, through staged memory.
void run_stats(int64_t m, int64_t k) {
  constexpr int kTileRows = kConvStatsRows, kGroups = 4, kRows = kTileRows / kGroups;
  const auto z = read_floats(m * k);
  const int64_t tiles = ceil_div(m, kConvStatsRows);
  std::vector<float> tile_mean(static_cast<size_t>(tiles * k)), tile_m2(tile_mean.size());
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int count = static_cast<int>(m - tile * kTileRows);
    for (int64_t first = 0; first < k; first += kStagedColumns) {
      std::vector<float> memory(kTileRows * kStagedColumns, NAN);
      for (int r = 0; r < kTileRows; ++r) {
        for (int c = 0; c < kStagedColumns; ++c) {
          float& place = memory.at(static_cast<size_t>(staged(r, c)));
          if (!std::isnan(place)) cuda_on_cpu::fail("two values are staged at one place");
          const bool inside = r < count && first + c < k;
          // what is beyond the last pixel must not matter
          place = inside ? z[static_cast<size_t>((tile * kTileRows + r) * k + first + c)] : 1e30F;
        }
      }
      for (int c = 0; c < kStagedColumns && first + c < k; ++c) {
        float means[kGroups], m2s[kGroups];
        for (int group = 0; group < kGroups; ++group) {
          float values[kRows];
          for (int i = 0; i < kRows; ++i) {
            values[i] = memory[static_cast<size_t>(staged(group * kRows + i, c))];
          }
          column_moments(values, count - group * kRows, means[group], m2s[group]);
        }
        const size_t o = static_cast<size_t>(tile * k + first + c);
        join_columns<kRows>(means, m2s, count, tile_mean[o], tile_m2[o]);
      }
    }
  }
  std::vector<float> mean(static_cast<size_t>(k)), m2(mean.size());
  const char* error = merge_stats({Storage::f32, nullptr}, {m,
                                                            k,
                                                            tiles,
                                                            kConvStatsRows,
                                                            tile_mean.data(),
                                                            nullptr,
                                                            tile_m2.data(),
                                                            {mean.data(), false},
                                                            {m2.data(), false}});
  if (error) cuda_on_cpu::fail(error);
  write(mean);
  write(m2);
}

}  // namespace
}  // namespace resfast::cuda

int main() {
  using namespace resfast::cuda;
  cuda_on_cpu::shared_arrays = {{scratch, sizeof scratch}, {scratch_double, sizeof scratch_double}};
  int64_t call[6];
  read(call, sizeof call);
  if (call[0] == 0) {
    run_finish(call[1], call[3], {call[4] != 0, call[5] != 0});
  } else {
    run_stats(call[1], call[2]);
  }
}

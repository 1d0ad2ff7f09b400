// What a convolution does with its accumulators, one value or one column at a time, host and
// device.
#pragma once

#include "math.h"

namespace resfast::cuda {

// Where the ReLU is: nowhere, before the residual, or last.
struct Finish {
  bool relu, add_after_act;
};

template <class V>
RESFAST_HD V finish(V z, V mean, V scale, V beta, Finish f) {
  const V u = affine(z, mean, scale, beta);
  return f.relu ? relu(u) : u;
}

template <class V>
RESFAST_HD V finish(V z, V mean, V scale, V beta, V residual, Finish f) {
  V u = affine(z, mean, scale, beta);
  if (f.relu && f.add_after_act) u = relu(u);
  u += residual;
  return f.relu && !f.add_after_act ? relu(u) : u;
}

// Columns of a tile that statistics are taken of, and where a value of it waits for that, so that 8
// rows of 4 pairs, as a warp's threads have them, lie in 32 banks, and so does every row.
inline constexpr int kStagedColumns = 32;
RESFAST_HD int staged(int row, int column) {
  return row * kStagedColumns + (column ^ ((row >> 1 & 3) << 3));
}

// Mean and M2 of the first `count` of a column's values, 0 of none. Of 16-bit values: what rounding
// their mean to float loses is far below their distance, so one correction less than for float32.
template <int kRows, class V>
RESFAST_HD void column_moments(const V (&z)[kRows], int count, V& mean, V& m2) {
  mean = m2 = V{};
  if (count <= 0) return;
  V sum{};
  for (int i = 0; i < kRows; ++i) sum += i < count ? z[i] : V{};
  mean = sum / static_cast<V>(count < kRows ? count : kRows);
  for (int i = 0; i < kRows; ++i) {
    const V delta = i < count ? z[i] - mean : V{};
    m2 += delta * delta;
  }
}

// The moments of `kGroups` columns of kRows values under each other, of which `count` are there.
template <int kRows, int kGroups, class V>
RESFAST_HD void join_columns(const V (&means)[kGroups], const V (&m2s)[kGroups], int count, V& mean,
                             V& m2) {
  mean = means[0];
  m2 = m2s[0];
  for (int group = 1; group < kGroups; ++group) {
    const int before = group * kRows;
    const int more = count - before < kRows ? count - before : kRows;
    if (more <= 0) return;
    merge_moments(mean, m2, static_cast<V>(before), means[group], m2s[group],
                  static_cast<V>(more) / static_cast<V>(before + more));
  }
}

}  // namespace resfast::cuda

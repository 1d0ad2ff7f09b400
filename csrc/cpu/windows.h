// The windows that a convolution's output pixels see of its input, and their gathering (im2col).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"

namespace resfast {

// The first value of a pixel's window: both may lie outside of the image in part.
template <class T>
struct Corner {
  const T* image;
  int64_t y, x;
  const T* whole;  // the value, where the whole window is inside
};

// An output pixel.
struct Place {
  int64_t image, row, column;
};

// Neighbouring values of a window: in one of its rows, from `start`.
struct Run {
  int64_t row, start, length;
};

// The windows of an NHWC activation as rows of a matrix: [pixels of the output,
// kernel_h·kernel_w·c], zero outside of the image.
template <class T>
struct Windows {
  const T* x;
  int64_t n, c, h, w;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t first_y, first_x;  // of the first window
  int64_t rows, columns;     // of an image's windows

  int64_t count() const { return n * rows * columns; }
  int64_t width() const { return kernel_h * kernel_w * c; }

  Place place(int64_t window) const {
    return {window / (rows * columns), window / columns % rows, window % columns};
  }

  // To the next window: divisions would cost as much as a narrow window's product.
  void advance(Place& p) const {
    if (++p.column < columns) return;
    p.column = 0;
    if (++p.row < rows) return;
    p.row = 0;
    ++p.image;
  }

  Corner<T> corner(const Place& p) const {
    const int64_t top = p.row * stride_h + first_y, left = p.column * stride_w + first_x;
    const bool inside = top >= 0 && top + kernel_h <= h && left >= 0 && left + kernel_w <= w;
    const T* const image = x + p.image * h * w * c;
    return {image, top, left, inside ? image + (top * w + left) * c : nullptr};
  }

  // Columns [begin, begin + length): each run of them in one row of the window.
  std::vector<Run> runs(int64_t begin, int64_t length) const {
    const int64_t line = kernel_w * c;
    std::vector<Run> found;
    for (int64_t done = 0; done < length;) {
      const int64_t row = (begin + done) / line, start = (begin + done) % line;
      found.push_back({row, start, std::min(length - done, line - start)});
      done += found.back().length;
    }
    return found;
  }

  // call(values, before, inside, after) for each run: how many are outside of the image before and
  // after those at `values`
  template <class Call>
  void each_run(const Corner<T>& at, const std::vector<Run>& runs, const Call& call) const {
    const int64_t line = w * c;
    if (at.whole) {
      for (const Run& run : runs) call(at.whole + run.row * line + run.start, 0, run.length, 0);
      return;
    }
    for (const Run& run : runs) {
      const int64_t y = at.y + run.row, start = at.x * c + run.start;
      if (y < 0 || y >= h) {
        call(nullptr, run.length, 0, 0);
        continue;
      }
      const int64_t before = std::clamp<int64_t>(-start, 0, run.length);
      const int64_t until = std::clamp<int64_t>(line - start, before, run.length);
      call(at.image + y * line + start + before, before, until - before, run.length - until);
    }
  }

  // A few values at a time, where that is all: a call would cost as much.
  static T* copy(const T* values, int64_t count, T* to) {
    constexpr int64_t kAtOnce = 16;
    if (count % kAtOnce != 0) return std::copy(values, values + count, to);
    for (int64_t i = 0; i < count; i += kAtOnce) {
      std::memcpy(to + i, values + i, kAtOnce * sizeof(T));
    }
    return to + count;
  }

  void gather(const Corner<T>& at, const std::vector<Run>& runs, T* to) const {
    each_run(at, runs, [&](const T* values, int64_t before, int64_t inside, int64_t after) {
      for (int64_t i = 0; i < before; ++i) *to++ = T{};
      if (inside > 0) to = copy(values, inside, to);
      for (int64_t i = 0; i < after; ++i) *to++ = T{};
    });
  }

  void fetch(const Corner<T>& at, const std::vector<Run>& runs) const {
    each_run(at, runs, [](const T* values, int64_t, int64_t inside, int64_t) {
      for (int64_t i = 0; i < inside; i += 64 / int64_t{sizeof(T)})
        __builtin_prefetch(values + i, 0, 2);
    });
  }
};

// The windows of a convolution of x, after checks that they make `out`, but for its channels.
template <class T>
Windows<T> convolution_windows(const Tensor& x, int64_t kernel_h, int64_t kernel_w,
                               int64_t stride_h, int64_t stride_w, int64_t padding_h,
                               int64_t padding_w, const Tensor& out) {
  STD_TORCH_CHECK(kernel_h >= 1 && kernel_w >= 1 && stride_h >= 1 && stride_w >= 1 &&
                      padding_h >= 0 && padding_w >= 0,
                  "kernel and stride must be at least 1, padding at least 0");
  const int64_t room_h = x.size(2) + 2 * padding_h - kernel_h;
  const int64_t room_w = x.size(3) + 2 * padding_w - kernel_w;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "the kernel must fit into the padded x ",
                  shape_of(x));
  const int64_t rows = room_h / stride_h + 1, columns = room_w / stride_w + 1;
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(2) == rows && out.size(3) == columns,
                  "out must be [", x.size(0), ", K, ", rows, ", ", columns, "], got ",
                  shape_of(out));
  return {static_cast<const T*>(x.const_data_ptr()),
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          kernel_h,
          kernel_w,
          stride_h,
          stride_w,
          -padding_h,
          -padding_w,
          rows,
          columns};
}

}  // namespace resfast

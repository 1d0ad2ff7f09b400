// Runs norm kernels on the CPU: reads calls from standard input, answers with their buffers.
//
// A call is int64 numbers (see Header), a double eps, and the buffers: each its bytes, by how many
// bytes its memory starts after a multiple of 16, and its contents; bytes of -1 stand for none, and
// -2 - i for the memory of buffer i. Each lies in memory of exactly its size. The answer is the
// contents of all buffers. Both orders of threads must agree on them.
#include "cuda/norm.cu"
#include "cuda/norm_backward.cu"

namespace resfast::cuda {
namespace {

alignas(16) float scratch[kHeldThreads * kWide];
alignas(16) double scratch_double[kHeldThreads];

struct Header {
  int64_t op, m, c, storage, aligned, processors, mask, relu, add_after_act, n;
  double eps;
  int64_t buffers;
};

class Buffer {
 public:
  Buffer(int64_t bytes, int64_t shift) : bytes_(bytes), shift_(shift), data_(bytes + shift) {}
  char* get() { return data_.data() + shift_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Memory {  // of exactly this size, unlike a vector's
    explicit Memory(int64_t bytes) : p(static_cast<char*>(std::malloc(bytes))) {}
    char* data() { return p.get(); }
    std::unique_ptr<char, Free> p;
  };
  int64_t bytes_, shift_;
  Memory data_;
};

bool read(void* to, int64_t bytes) {
  return std::fread(to, 1, static_cast<size_t>(bytes), stdin) == static_cast<size_t>(bytes);
}

struct Operands {
  std::vector<char*> pointers;

  template <class T = void>
  T* at(size_t i) const {
    return reinterpret_cast<T*>(pointers[i]);
  }
  const float* vector(size_t i) const { return at<const float>(i); }
  Affine affine(size_t i) const { return {vector(i), vector(i + 1), vector(i + 2)}; }
};

Buffer scratch_of(int64_t floats) {
  Buffer b(floats * 4, 0);
  std::memset(b.get(), 0xff, static_cast<size_t>(floats * 4));
  return b;
}

void check(const char* error) {
  if (error) cuda_on_cpu::fail(error);
}

void run_call(const Header& h, const Operands& o) {
  const Launch launch{static_cast<Storage>(h.storage), nullptr};
  const int64_t m = h.m, c = h.c;
  const int lanes = lanes_of(c, h.aligned);
  const int processors = static_cast<int>(h.processors);
  const Tiling reduction = reduction_tiling(m, c, lanes, processors);
  const Tiling elementwise = elementwise_tiling(m, c, lanes, processors);
  const Tiling held = held_tiling(m, c, lanes, launch.storage == Storage::f32 ? 4 : 2);
  const Mask mask = static_cast<Mask>(h.mask);
  const bool relu = h.relu, after = h.add_after_act;
  const float eps = static_cast<float>(h.eps);
  const int64_t plane = reduction.tiles * c;
  switch (h.op) {
    case 0: {
      Buffer b = scratch_of(3 * plane);
      float* const s = reinterpret_cast<float*>(b.get());
      check(norm_stats(launch, {m, c, reduction, o.at(0), s, s + plane, s + 2 * plane}));
      // n: 1 for a mean in double, and 2 for M2
      return check(merge_stats(launch, {m,
                                        c,
                                        reduction.tiles,
                                        reduction.rows,
                                        s,
                                        s + plane,
                                        s + 2 * plane,
                                        {o.at(1), (h.n & 1) != 0},
                                        {o.at(2), (h.n & 2) != 0}}));
    }
    case 1:
      return check(norm_prepare(launch, {c, eps, o.vector(0), o.vector(1), o.vector(2),
                                         o.at<float>(3), o.at<float>(4), o.at<float>(5)}));
    case 2:
      return check(norm_coefficients(
          launch, {c, static_cast<float>(h.n), o.vector(0), o.vector(1), o.vector(2), o.vector(3),
                   o.at<float>(4), o.at<float>(5), o.at<float>(6)}));
    case 3:
      return check(norm_apply(launch, {m, c, elementwise, o.at(0), o.affine(1), o.at(4),
                                       o.affine(5), relu, after, o.at(8), o.at<uint8_t>(9)}));
    case 4: {
      const int64_t kinds = o.at(8) ? 3 : 2;
      Buffer b = scratch_of(kinds * plane);
      float* const s = reinterpret_cast<float*>(b.get());
      check(norm_backward_reduce(
          launch, {m, c, reduction, o.at(0), o.at(1), o.at(2), o.affine(3), mask, o.at(6),
                   o.at<uint8_t>(7), relu, o.at(8), o.vector(9), o.at(11), o.at(12), s}));
      return check(merge_sums(launch, {c, reduction.tiles, kinds, s, o.at<float>(10)}));
    }
    case 5:
      return check(norm_backward_apply(
          launch, {m, c, elementwise, o.at(0), o.at(1), o.affine(2), mask, o.at(5), o.vector(6),
                   o.vector(7), o.at(13), o.at(14), o.at(8), o.vector(9), o.vector(10),
                   o.vector(11), o.vector(12), o.at(15)}));
    case 6:
      return check(
          norm_forward(launch, {m, c, held, o.at(0), o.vector(1), o.vector(2), eps, o.at(3), relu,
                                after, o.at(4), o.at<uint8_t>(5), o.at<float>(6), o.at<float>(7)}));
    case 7:
      return check(norm_backward(
          launch,
          {m, c, held, o.at(0), o.at(1), o.at(2), o.affine(3), o.vector(6), mask, o.at(7),
           o.at<uint8_t>(8), relu, o.at(9), o.at(10), o.at(11), o.at<float>(12), o.at<float>(13)}));
    case 8: {
      int64_t* out = o.at<int64_t>(0);
      for (const Tiling& t : {reduction, elementwise, held}) {
        for (int64_t v : {int64_t{t.lanes}, int64_t{t.threads_c}, int64_t{t.threads_m}, t.blocks_c,
                          t.tiles, t.rows}) {
          *out++ = v;
        }
      }
      return;
    }
    default:
      cuda_on_cpu::fail("no such op");
  }
}

// One call; false at the end of the input.
bool serve() {
  Header h;
  if (!read(&h, sizeof h)) return false;
  std::vector<std::vector<char>> contents(static_cast<size_t>(h.buffers));
  std::vector<int64_t> kinds(contents.size()), shifts(contents.size());
  for (size_t i = 0; i < contents.size(); ++i) {
    if (!read(&kinds[i], 8) || !read(&shifts[i], 8))
      cuda_on_cpu::fail("the input ends within a call");
    if (kinds[i] < 0) continue;
    contents[i].resize(static_cast<size_t>(kinds[i]));
    if (!read(contents[i].data(), kinds[i])) cuda_on_cpu::fail("the input ends within a buffer");
  }
  std::vector<std::vector<char>> results[2];
  for (const bool descending : {false, true}) {
    cuda_on_cpu::descending = descending;
    std::vector<std::unique_ptr<Buffer>> buffers(contents.size());
    Operands operands;
    for (size_t i = 0; i < contents.size(); ++i) {
      char* p = nullptr;
      if (kinds[i] >= 0) {
        buffers[i] = std::make_unique<Buffer>(kinds[i], shifts[i]);
        p = buffers[i]->get();
        std::memcpy(p, contents[i].data(), contents[i].size());
      } else if (kinds[i] <= -2) {
        p = operands.pointers[static_cast<size_t>(-2 - kinds[i])];
      }
      operands.pointers.push_back(p);
    }
    run_call(h, operands);
    for (const auto& b : buffers) {
      if (b) results[descending].emplace_back(b->get(), b->get() + b->bytes());
    }
  }
  if (results[0] != results[1]) cuda_on_cpu::fail("results depend on the order of threads");
  for (const auto& r : results[0]) std::fwrite(r.data(), 1, r.size(), stdout);
  std::fflush(stdout);
  return true;
}

}  // namespace
}  // namespace resfast::cuda

int main() {
  using namespace resfast::cuda;
  cuda_on_cpu::shared_arrays = {{scratch, sizeof scratch}, {scratch_double, sizeof scratch_double}};
  while (serve()) {
  }
}

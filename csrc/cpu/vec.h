// Vectors of the accumulation type and their conversion from and to storage. Included by kernel
// sources only, inside no namespace; everything is in an anonymous namespace and always inlined,
// because each instruction set compiles its own copy. Include no other project or torch header
// that defines functions here, nor any of the standard library's.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define RESFAST_INLINE inline __attribute__((always_inline))
#define RESFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace resfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A number as a type, to pass to a generic lambda.
template <int N>
struct Int {
  static constexpr int value = N;
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class S>
using acc_t = typename AccOf<S>::type;

template <class S>
constexpr int kLanes = kVectorBytes / sizeof(acc_t<S>);

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVec __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t ShortVec __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
struct VecOf {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};
template <class S>
using Vec = typename VecOf<acc_t<S>>::type;

// One integer per lane, as comparisons yield them, and its form in memory: a byte.
template <class A>
struct IndexOf {
  using vec = IntVec;
  using lane = int32_t;
};
template <>
struct IndexOf<double> {
  using vec = LongVec;
  using lane = int64_t;
};
template <class S>
using IndexVec = typename IndexOf<acc_t<S>>::vec;
template <class S>
using IndexLane = typename IndexOf<acc_t<S>>::lane;
typedef uint8_t IntBytes __attribute__((vector_size(kVectorBytes / 4)));
typedef uint8_t LongBytes __attribute__((vector_size(kVectorBytes / 8)));

// Lane counts: all of a vector, or the first `count` at the end of a row.
struct Full {};
struct Partial {
  int count;
};

// ---- raw unaligned access

// Through a vector type of no alignment: GCC takes a memcpy of 16 bytes for an integer, and then
// widens it byte by byte.
template <class R>
struct Unaligned {
  typedef R type __attribute__((aligned(1), may_alias));
};

template <class R, class P>
RESFAST_INLINE R load_raw(const P* p) {
  return *reinterpret_cast<const typename Unaligned<R>::type*>(p);
}

template <class R, class P>
RESFAST_INLINE void store_raw(P* p, R r) {
  *reinterpret_cast<typename Unaligned<R>::type*>(p) = r;
}

// Not inlined: rare (row tails) and many.
template <class R, class P>
__attribute__((noinline)) R load_raw(const P* p, int count) {
  constexpr int kCount = sizeof(R) / sizeof(P);
  P lanes[kCount] = {};
  for (int i = 0; i < kCount; ++i) {
    if (i < count) lanes[i] = p[i];
  }
  return load_raw<R>(lanes);
}

template <class R, class P>
__attribute__((noinline)) void store_raw(P* p, R r, int count) {
  constexpr int kCount = sizeof(R) / sizeof(P);
  P lanes[kCount];
  store_raw(lanes, r);
  for (int i = 0; i < kCount; ++i) {
    if (i < count) p[i] = lanes[i];
  }
}

#if defined(__AVX512F__)
template <>
RESFAST_INLINE FloatVec load_raw<FloatVec, float>(const float* p, int count) {
  return (FloatVec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
template <>
RESFAST_INLINE DoubleVec load_raw<DoubleVec, double>(const double* p, int count) {
  return (DoubleVec)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
}
template <>
RESFAST_INLINE ShortVec load_raw<ShortVec, uint16_t>(const uint16_t* p, int count) {
  return (ShortVec)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
}
template <>
RESFAST_INLINE void store_raw<FloatVec, float>(float* p, FloatVec r, int count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)r);
}
template <>
RESFAST_INLINE void store_raw<DoubleVec, double>(double* p, DoubleVec r, int count) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)r);
}
template <>
RESFAST_INLINE void store_raw<ShortVec, uint16_t>(uint16_t* p, ShortVec r, int count) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)r);
}
#endif

// ---- 16-bit formats

RESFAST_INLINE FloatVec widen(BFloat16, ShortVec bits) {
  return (FloatVec)(__builtin_convertvector(bits, UintVec) << 16);
}

RESFAST_INLINE ShortVec narrow(BFloat16, FloatVec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const UintVec quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, ShortVec);
}

#if defined(__AVX512F__)
RESFAST_INLINE FloatVec widen(Half, ShortVec bits) {
  return (FloatVec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
RESFAST_INLINE ShortVec narrow(Half, FloatVec v) {
  return (ShortVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)v,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
RESFAST_INLINE FloatVec widen(Half, ShortVec bits) {
  return (FloatVec)_mm256_cvtph_ps((__m128i)bits);
}
RESFAST_INLINE ShortVec narrow(Half, FloatVec v) {
  return (ShortVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Multiplying by 2^112 rebiases the exponent and makes subnormal halves exact normal floats.
RESFAST_INLINE FloatVec widen(Half, ShortVec bits) {
  const UintVec wide = __builtin_convertvector(bits, UintVec);
  const UintVec magnitude = (wide & 0x7fffu) << 13;
  const UintVec finite = (UintVec)((FloatVec)magnitude * 0x1p112f);
  const UintVec special = magnitude | 0x7f800000u;  // infinity, NaN
  return (FloatVec)((magnitude >= 0x0f800000u ? special : finite) | ((wide & 0x8000u) << 16));
}
// Normal halves round in the integer domain; below 2^-14 adding 0.5 lets the adder round at 2^-24.
RESFAST_INLINE ShortVec narrow(Half, FloatVec v) {
  const UintVec bits = (UintVec)v;
  const UintVec magnitude = bits & 0x7fffffffu;
  const UintVec sign = (bits >> 16) & 0x8000u;
  const UintVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const UintVec subnormal = (UintVec)((FloatVec)magnitude + 0.5f) - 0x3f000000u;
  UintVec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? (UintVec){} + 0x7c00u : half;  // 65536 and above: infinity
  half = magnitude > 0x7f800000u ? (UintVec){} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, ShortVec);
}
#endif

// ---- load and store

RESFAST_INLINE FloatVec load(const float* p, Full) {
  return load_raw<FloatVec>(p);
}
RESFAST_INLINE FloatVec load(const float* p, Partial n) {
  return load_raw<FloatVec>(p, n.count);
}
RESFAST_INLINE DoubleVec load(const double* p, Full) {
  return load_raw<DoubleVec>(p);
}
RESFAST_INLINE DoubleVec load(const double* p, Partial n) {
  return load_raw<DoubleVec>(p, n.count);
}
template <class S>
RESFAST_INLINE FloatVec load(const S* p, Full) {
  return widen(S{}, load_raw<ShortVec>(&p->bits));
}
template <class S>
RESFAST_INLINE FloatVec load(const S* p, Partial n) {
  return widen(S{}, load_raw<ShortVec>(&p->bits, n.count));
}

RESFAST_INLINE void store(float* p, FloatVec v, Full) {
  store_raw(p, v);
}
RESFAST_INLINE void store(float* p, FloatVec v, Partial n) {
  store_raw(p, v, n.count);
}
RESFAST_INLINE void store(double* p, DoubleVec v, Full) {
  store_raw(p, v);
}
RESFAST_INLINE void store(double* p, DoubleVec v, Partial n) {
  store_raw(p, v, n.count);
}
template <class S>
RESFAST_INLINE void store(S* p, FloatVec v, Full) {
  store_raw(&p->bits, narrow(S{}, v));
}
template <class S>
RESFAST_INLINE void store(S* p, FloatVec v, Partial n) {
  store_raw(&p->bits, narrow(S{}, v), n.count);
}

// a > b ? a : b, so b where either is NaN; GCC makes two instructions of that.
#if defined(__AVX512F__)
RESFAST_INLINE FloatVec maximum(FloatVec a, FloatVec b) {
  return (FloatVec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
RESFAST_INLINE DoubleVec maximum(DoubleVec a, DoubleVec b) {
  return (DoubleVec)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
}
#elif defined(__AVX2__)
RESFAST_INLINE FloatVec maximum(FloatVec a, FloatVec b) {
  return (FloatVec)_mm256_max_ps((__m256)a, (__m256)b);
}
RESFAST_INLINE DoubleVec maximum(DoubleVec a, DoubleVec b) {
  return (DoubleVec)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#else
template <class V>
RESFAST_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
#endif

// A factor of two at a time: GCC takes longer steps lane by lane.
typedef uint16_t LongShorts __attribute__((vector_size(kVectorBytes / 4)));
typedef uint32_t LongInts __attribute__((vector_size(kVectorBytes / 2)));

RESFAST_INLINE IntVec widen_index(IntBytes bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, ShortVec), IntVec);
}
RESFAST_INLINE LongVec widen_index(LongBytes bytes) {
  const LongShorts shorts = __builtin_convertvector(bytes, LongShorts);
  return __builtin_convertvector(__builtin_convertvector(shorts, LongInts), LongVec);
}
RESFAST_INLINE IntBytes narrow_index(IntVec v) {
  return __builtin_convertvector(__builtin_convertvector(v, ShortVec), IntBytes);
}
RESFAST_INLINE LongBytes narrow_index(LongVec v) {
  const LongInts ints = __builtin_convertvector(v, LongInts);
  return __builtin_convertvector(__builtin_convertvector(ints, LongShorts), LongBytes);
}

template <class S>
using IndexBytes = decltype(narrow_index(IndexVec<S>{}));

template <class S>
RESFAST_INLINE IndexVec<S> load_index(const uint8_t* p, Full) {
  return widen_index(load_raw<IndexBytes<S>>(p));
}
template <class S>
RESFAST_INLINE IndexVec<S> load_index(const uint8_t* p, Partial n) {
  return widen_index(load_raw<IndexBytes<S>>(p, n.count));
}
template <class S>
RESFAST_INLINE void store_index(uint8_t* p, IndexVec<S> v, Full) {
  store_raw(p, narrow_index(v));
}
template <class S>
RESFAST_INLINE void store_index(uint8_t* p, IndexVec<S> v, Partial n) {
  store_raw(p, narrow_index(v), n.count);
}

}  // namespace
}  // namespace resfast

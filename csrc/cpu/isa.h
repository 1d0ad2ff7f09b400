// The instruction set chosen at run time.
#pragma once

#include <string>

namespace resfast {

enum class Isa { scalar, avx2, avx512 };

// The best set that was compiled in and that this CPU has, or the one RESFAST_CPU_ISA or
// set_cpu_isa asks for. Throws std::runtime_error where that one is unknown or not available.
Isa cpu_isa();

// nullptr or "" goes back to the automatic choice.
void set_cpu_isa(const char* name);

const char* isa_name(Isa isa);

// Whether products of bfloat16 pairs were compiled in, and run here: on avx512, if that is chosen.
bool has_bf16_products();

template <class Kernels>
const Kernels& pick(const Kernels& scalar, const Kernels& avx2, const Kernels& avx512) {
  const Isa isa = cpu_isa();
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : scalar;
}

}  // namespace resfast

// The table of kernels `name`_<isa> of the chosen set; cpu_isa() is never one not compiled in.
#if defined(RESFAST_HAS_AVX2)
#define RESFAST_AVX2_TABLE(name) name##_avx2
#else
#define RESFAST_AVX2_TABLE(name) name##_scalar
#endif
#if defined(RESFAST_HAS_AVX512)
#define RESFAST_AVX512_TABLE(name) name##_avx512
#else
#define RESFAST_AVX512_TABLE(name) name##_scalar
#endif
#define RESFAST_PICK(name) \
  ::resfast::pick(name##_scalar, RESFAST_AVX2_TABLE(name), RESFAST_AVX512_TABLE(name))

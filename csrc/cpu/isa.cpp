#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace resfast {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};

bool compiled_in([[maybe_unused]] Isa isa) {
#if defined(RESFAST_HAS_AVX2)
  if (isa == Isa::avx2) return true;
#endif
#if defined(RESFAST_HAS_AVX512)
  if (isa == Isa::avx512) return true;
#endif
  return isa == Isa::scalar;
}

bool cpu_has([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::scalar;
}

bool available(Isa isa) {
  return compiled_in(isa) && cpu_has(isa);
}

Isa parse(const std::string& name, const std::string& origin) {
  for (Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    if (available(isa)) return isa;
    throw std::runtime_error(origin + ": '" + name + "' is not available: " +
                             (compiled_in(isa) ? "this CPU lacks it" : "it was not compiled in"));
  }
  throw std::runtime_error(origin + ": '" + name +
                           "' is no instruction set; expected avx512, avx2 or scalar");
}

Isa automatic() {
  const char* asked = std::getenv("RESFAST_CPU_ISA");
  if (asked && *asked) return parse(asked, "RESFAST_CPU_ISA");
  Isa best = Isa::scalar;
  for (Isa isa : kAll) {
    if (available(isa)) best = isa;
  }
  return best;
}

std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Isa cpu_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(automatic());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool has_bf16_products() {
#if defined(RESFAST_HAS_AVX512BF16)
  static const bool here = __builtin_cpu_supports("avx512bf16");
  return here && cpu_isa() == Isa::avx512;
#else
  return false;
#endif
}

void set_cpu_isa(const char* name) {
  const Isa isa = name && *name ? parse(name, "set_cpu_isa") : automatic();
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

}  // namespace resfast

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

}  // namespace resfast

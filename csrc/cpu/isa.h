// The instruction sets that the kernels of *.isa.cpp are compiled for, and the one in use.
#pragma once
#include <string>
#include <vector>

namespace emp_fast::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The instruction sets that this build has and this processor runs, the best last.
const std::vector<Isa>& supported_isas();

const char* isa_name(Isa isa);

// The best supported one, unless set_isa chose another.
Isa active_isa();

// Throws std::invalid_argument for an unknown or unsupported name.
void set_isa(const std::string& name);

// Declares the `name` of every instruction set, which the *.isa.cpp files define, and name(), that
// of the instruction set in use.
#ifdef EMP_FAST_X86
#define EMP_FAST_FOR_EACH_ISA(Type, name)                   \
  namespace baseline {                                      \
  extern const Type name;                                   \
  }                                                         \
  namespace avx2 {                                          \
  extern const Type name;                                   \
  }                                                         \
  namespace avx512 {                                        \
  extern const Type name;                                   \
  }                                                         \
  inline const Type& name() {                               \
    const Isa isa = active_isa();                           \
    if (isa == Isa::kAvx512) return avx512::name;           \
    return isa == Isa::kAvx2 ? avx2::name : baseline::name; \
  }
#else
#define EMP_FAST_FOR_EACH_ISA(Type, name) \
  namespace baseline {                    \
  extern const Type name;                 \
  }                                       \
  inline const Type& name() { return baseline::name; }
#endif

}  // namespace emp_fast::cpu

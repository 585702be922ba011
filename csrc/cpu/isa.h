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

}  // namespace emp_fast::cpu

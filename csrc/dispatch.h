#pragma once

#include <vector>

#include "contract.h"

namespace halfbyte {

// The tiers that this build and this chip have, best first; the last is always `scalar`. A tier whose state the
// operating system does not save counts as absent (the compiler's run-time library asks XCR0 beside CPUID).
std::vector<const Tier*> available_tiers();

}  // namespace halfbyte

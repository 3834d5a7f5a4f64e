// The ceiling of a tier: the fastest arithmetic that it has for a product of bf16 matrices, in registers alone.

#pragma once

#include <cstdint>

#include "contract.h"

namespace halfbyte {

struct Probe {
    const Tier* tier;
    const char* arithmetic;
    bool (*supported)();
    int64_t operations;           // additions and multiplications in one round
    float (*run)(int64_t rounds); // a value that depends on all of them
};

// The best probe of this tier that the chip has.
const Probe& probe_of(const Tier& tier);

}  // namespace halfbyte

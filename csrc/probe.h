// The ceilings of a tier, in registers alone: the fastest arithmetic that it has for a product of bf16 matrices, and
// the lookups of 4-bit values that a product of few rows takes.

#pragma once

#include <cstdint>

#include "contract.h"

namespace halfbyte {

struct Probe {
    const Tier* tier;
    const char* arithmetic;
    bool (*supported)();
    int64_t operations;            // additions and multiplications in one round
    float (*run)(int64_t rounds);  // a value that depends on all of them
};

// The best probe of this tier that the chip has.
const Probe& probe_of(const Tier& tier);

struct LookupProbe {
    const Tier* tier;
    int64_t values;  // looked up in one round
    int (*run)(int64_t rounds);
};

// The tier's lookups, where their rate is measured; else null.
const LookupProbe* lookup_probe_of(const Tier& tier);

}  // namespace halfbyte

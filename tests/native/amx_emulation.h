#pragma once

#include "contract.h"

namespace halfbyte {

// The AMX tier on a tile unit in plain C++; supported where the chip has the instructions of the rest of it.
extern const Tier emulated_amx;

}  // namespace halfbyte

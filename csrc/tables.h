// What kernels need of a table of values, made once per call: search trees of the midpoints, and lines through them.

#pragma once

#include "adamw.h"
#include "contract.h"

namespace halfbyte {

// Tables of fp32 values, at any address.
Search4 search4(const void* code);            // 16, in any order; of equal ones the first code counts
Search8 search8(const void* code, int size);  // up to 256, ascending
Table8bit table8bit(const void* code);        // 256, ascending

}  // namespace halfbyte

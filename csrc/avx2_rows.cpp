// The AVX2 tier's element-wise kernels: see rows.h.

#if defined(__x86_64__)

#include "avx2_lanes.h"
#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const RowKernels avx2_rows = row_kernels;

}  // namespace halfbyte

#endif

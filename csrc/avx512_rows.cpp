// The AVX-512 tier's element-wise kernels: see rows.h.

#if defined(__x86_64__)

#include "avx512_lanes.h"
#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const RowKernels avx512_rows = row_kernels;

}  // namespace halfbyte

#endif

// The NEON tier's element-wise kernels: see rows.h.

#if defined(__aarch64__)

#include "neon_lanes.h"
#include "rows.h"

#include "rows.inl"

namespace halfbyte {

const RowKernels neon_rows = row_kernels;

}  // namespace halfbyte

#endif

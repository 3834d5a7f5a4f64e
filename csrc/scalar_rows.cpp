// The baseline tier's element-wise kernels: see rows.h.

#include "rows.h"
#include "scalar_lanes.h"

#include "rows.inl"

namespace halfbyte {

const RowKernels scalar_rows = row_kernels;

}  // namespace halfbyte

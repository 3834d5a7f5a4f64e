// Element-wise kernels, over rows: written once, over a tier's lanes, and compiled for every tier.
//
// A new kernel is a template over `Lanes` (avx512_lanes.h, avx2_lanes.h, scalar_lanes.h, lanes.inl) in an .inl file, an
// entry of RowKernels here and in `row_kernels` of rows.inl; each tier's *_rows.cpp includes rows.inl within its target
// region. A kernel goes through a row in steps of Lanes::kWidth with the remaining length as read's and write's last
// argument, which makes a short last step right. Arithmetic is fp32; a result does not depend on how rows are shared
// out, but tiers differ in the last places, since they add in another order and not all fuse multiply-adds.

#pragma once

#include "contract.h"

namespace halfbyte {

// A chunk of the vocabulary, taken into the softmax of each row: fold_softmax of kernels/reference.py.
struct FoldSoftmax {
    void* logits;  // [n, width] of `type`; with `gradient` overwritten
    Type type;
    int64_t width;
    const int64_t* labels;  // one per row, indices into the whole vocabulary
    int64_t first;          // the chunk's first index
    float scale, cap;       // cap 0: none
    bool gradient;
    float *maximum, *sum, *weighted, *squares, *total, *label, *slope, *shrink;  // one per row, as in kernels/softmax.py
    int64_t* top;
};

struct RowKernels {
    // y = f(x) for n values: what lanes.inl promises, one function at a time.
    void (*exp)(const float* x, int64_t n, float* y);
    void (*sigmoid)(const float* x, int64_t n, float* y);
    void (*tanh)(const float* x, int64_t n, float* y);

    void (*fold_softmax)(const FoldSoftmax&, int64_t first, int64_t last);  // rows [first, last)
};

extern const RowKernels scalar_rows;
extern const RowKernels avx2_rows;
extern const RowKernels avx512_rows;

}  // namespace halfbyte

// Element-wise kernels, over rows: written once, over a tier's lanes, and compiled for every tier.
//
// A new kernel is a template over the storage type in an .inl file that rows.inl includes, an entry of RowKernels here
// and one of `row_kernels` in rows.inl; each tier's *_rows.cpp includes rows.inl within its target region, after the
// tier's `Lanes` (avx512_lanes.h, avx2_lanes.h, neon_lanes.h, scalar_lanes.h; lanes.inl). A kernel goes through a row
// in steps of Lanes::kWidth with the remaining length as read's and write's last argument, which makes a short last
// step right. Arithmetic is fp32; results do not depend on how rows are shared out, but tiers differ in the last
// places, since they add in another order and not all fuse multiply-adds.
//
// Values are of one storage type throughout a call unless said otherwise; a stride is the distance between rows, in
// values; outputs are contiguous unless they have a stride. Pointers to void may have any address. Formulas are those
// of src/halfbyte/kernels/reference.py. A function does the rows [first, last).

#pragma once

#include <math.h>

#include "contract.h"
#include "decode_rows.h"

namespace halfbyte {

struct Rows {
    const void* data;
    int64_t stride;
};

struct RmsNorm {
    Rows x, residual;    // residual: null for none
    const void* weight;  // width values
    int64_t width;
    float eps, offset;  // the weight's factor is offset + weight
    bool rounded;       // whether the normalized value is rounded before the weight multiplies it
    void* h;            // out: x + residual, if there is one
    void* y;            // out
    float* scale;       // out: 1 / sqrt(mean(h²) + eps), one per row
};

struct RmsNormGradient {
    Rows dy, h, dh;  // dh: what comes down to h from elsewhere; null for none
    const void* weight;
    const float* scale;
    int64_t width;
    float offset;
    void* dx;  // out
};

// The gradient of the weight goes through all rows for the columns [first, last).
struct RmsNormWeightGradient {
    Rows dy, h;
    const float* scale;
    int64_t rows;
    float* dweight;  // out: width values
};

enum class Activation : int { silu, gelu_tanh };

struct Gated {
    Rows gate, up;
    int64_t width;
    void* y;  // out: activation(gate) up
};

struct GatedGradient {
    Rows dy, gate, up;
    int64_t width;
    void *dgate, *dup;  // out
    int64_t stride;     // of both
};

// Rows are tokens, `length` to a sample; the first 2 half of a head's `size` values turn, the others are copied.
struct Rotary {
    const void* x;
    int64_t sample_stride, token_stride, head_stride;
    const void *cos, *sin;  // a token's 2 half values, fp32 or as x
    int64_t cos_sample_stride, cos_token_stride;
    int64_t length, heads, size, half;
    bool inverse;  // the transposed product: the gradient
    void* y;       // out: heads x size values a token
};

// By storage type (enum Type).
template <class Arguments>
using ByType = void (*[3])(const Arguments&, int64_t first, int64_t last);

// A chunk of the vocabulary, taken into the softmax of each row: fold_softmax of kernels/reference.py.
struct FoldSoftmax {
    void* logits;  // [n, width] of `type`; with `gradient` overwritten
    Type type;
    int64_t width;
    const int64_t* labels;  // one per row, indices into the whole vocabulary
    int64_t first;          // the chunk's first index
    float scale, cap;       // cap 0: none
    bool gradient;
    // One per row, as in kernels/softmax.py.
    float *maximum, *sum, *weighted, *squares, *total, *label, *slope, *shrink;
    int64_t* top;
};

struct RowKernels {
    // y = f(x) for n values: what lanes.inl promises, one function at a time.
    void (*exp)(const float* x, int64_t n, float* y);
    void (*sigmoid)(const float* x, int64_t n, float* y);
    void (*tanh)(const float* x, int64_t n, float* y);

    ByType<RmsNorm> rms_norm;
    ByType<RmsNormGradient> rms_norm_gradient;
    ByType<RmsNormWeightGradient> rms_norm_weight_gradient;
    ByType<Gated> gated[2];  // by activation
    ByType<GatedGradient> gated_gradient[2];
    ByType<Rotary> rotary[2];  // cos and sin as x, in fp32

    // The rows [first, last).
    void (*fold_softmax)(const FoldSoftmax&, int64_t first, int64_t last);

    DecodeKernels decode[3];  // by storage type
    CacheKernels cache[4];    // by what the cache keeps
};

extern const RowKernels scalar_rows;
extern const RowKernels avx2_rows;
extern const RowKernels avx512_rows;
extern const RowKernels neon_rows;

}  // namespace halfbyte

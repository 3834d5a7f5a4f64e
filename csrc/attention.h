// Attention (arXiv 2205.14135, 2307.08691), forward and backward, over key ranges instead of a mask.
//
//     out[i] = sum_j p[i, j] v[j],  p[i, j] = exp(z[i, j] - lse[i]),  lse[i] = log sum_j exp(z[i, j]),
//     z = scale q kᵀ, or with a soft cap c:  z = c tanh(scale q kᵀ / c),
//
// for each head on its own, where j runs over the keys [begin[i], end[i]) of query i. A query without keys gives 0.
// Query heads share the key/value heads in groups that follow each other. The gradients, with d = rowsum(dout out):
//
//     dv = pᵀ dout,  ds = scale (1 - (z / c)²) p (dout vᵀ - d),  dq = ds k,  dk = dsᵀ q.
//
// Products are those of matmul.h: the left factor lies as it is, the right one is laid out as a panel. Where the chip
// multiplies bf16, p and ds are rounded to it; sums and everything else is fp32. Tiles that no range meets are left
// out, so the work follows the ranges.
// Between forward and backward one number a row, lse, is kept. Every row is summed in an order that the shapes and
// ranges alone decide, so that results do not depend on the number of threads.
//
// Left out: dropout, an additive bias, attention sinks, keys and values of different head size.

#pragma once

#include "contract.h"
#include "matmul.h"

namespace halfbyte {

// A tensor [batch, head, row, value] whose values of a row follow each other; strides are in values.
struct Heads {
    void* values;
    int64_t batch, head, row;
};

struct Attention {
    // heads: a multiple of kv_heads, from 1 on; fewer than 2^24 keys
    int64_t batches, heads, kv_heads, queries, keys;
    int64_t size;            // of a head, up to kLanes
    Type type;               // of all but lse
    const int32_t* ranges;   // [batches, queries, 2]: begin and end
    float scale, cap;        // cap 0: none
    Heads q, k, v, out;      // out: written by the forward
    float* lse;              // [batches, heads, queries]: written by the forward; -inf without keys
    Heads dout, dq, dk, dv;  // backward: dq, dk and dv are written
};

constexpr int64_t kKeyTile = 96;  // keys that a tile of the backward has at most

// A tier's share, for one storage type: rows of tiles that are kStrip columns wide. `p` and `ds` are the elements of a
// left factor: bf16 where lanes are pairs, otherwise fp32. Pointers to float are aligned to 64 bytes.
struct AttentionKernels {
    // A row of the forward: p = exp(z - maximum), z being that of `products` and of scale `factor`, in the columns
    // [begin, end), begin < end; 0 in the others. The running maximum and total are brought up to date.
    // Returns the factor by which what was summed before has shrunk.
    float (*weigh)(const float* products, int64_t begin, int64_t end, float factor, float cap, float* maximum,
                   float* total, void* p);

    // A row of the backward, of one key: p and ds of the queries whose range has the key; 0 for the others.
    void (*differentiate)(const float* products, const float* dp, float key, const float* begin, const float* end,
                          const float* lse, const float* d, float factor, float cap, void* p, void* ds);

    // x *= factor, for kStrip values.
    void (*shrink)(float* x, float factor);

    // The sum of x[i] y[i], values of the storage type.
    float (*dot)(const void* x, const void* y, int64_t n);
};

// On a tier that has products and a share in this.
void attention_forward(const Tier& tier, const Attention& arguments, int threads);
void attention_backward(const Tier& tier, const Attention& arguments, int threads);

// The kernels of a tier; `pairs` as in its products.
const AttentionKernels* avx2_attention(Type type, bool pairs);
const AttentionKernels* avx512_attention(Type type, bool pairs);
const AttentionKernels* neon_attention(Type type, bool pairs);

namespace {

struct Columns {
    float index[kStrip];
};

constexpr Columns number_columns() {
    Columns columns{};
    for (int i = 0; i < kStrip; ++i) columns.index[i] = static_cast<float>(i);
    return columns;
}

constexpr Columns kColumns = number_columns();

}  // namespace
}  // namespace halfbyte

// The pieces of a decoder's step that lie between its products, as a tier has them (decode_rows.inl); see decode.h.

#pragma once

#include "contract.h"

namespace halfbyte {

constexpr int64_t kPage = 64;           // positions
constexpr int64_t kChunkOfPages = 512;  // positions that one thread attends to at a time
constexpr int64_t kHeadsAtOnce = 4;     // query heads that read a page together
constexpr int64_t kLargestHead = 512;

// y = (x - mean) / sqrt(variance + eps) weight; without `centered`, x / sqrt(mean(x²) + eps) weight.
struct DecodeNorm {
    bool there = false;
    const float* weight = nullptr;  // null: ones
    float eps = 0.0f;
    bool rounded = false;  // whether the normalized value is rounded to the storage type before the weight
    bool centered = false;
};

struct FinishProduct {
    const float* sums;
    const float* u;  // rank values
    const void* b;   // rank x width, of the storage type
    int64_t rank, width;
    const float *rescale, *bias, *extra_bias;  // width values each, or null
    float* out;
};

// The positions [begin, end) of a row, for the query heads of one key/value head.
struct AttendPages {
    const float* q;  // heads x size
    int64_t heads, size;
    const void* const* pages;
    int64_t keys, values, key_scales, value_scales;  // where in a page, in bytes
    int64_t begin, end;
    bool scaled;
    float cap;                     // 0: none
    float *maximum, *total, *out;  // out: of each head, and size values of each, not divided by the total yet
};

// By storage type. All of a row, or the columns [first, last).
struct DecodeKernels {
    void (*finish)(const FinishProduct&, int64_t first, int64_t last);
    void (*norm)(const DecodeNorm&, const float* x, int64_t width, void* y);
    void (*norm_in_place)(const DecodeNorm&, float* x, int64_t width);
    void (*round)(const float* x, int64_t n, void* y);
    void (*widen)(const void* x, int64_t n, float factor, float* y);
    void (*add)(float* x, const float* y, int64_t n);
    void (*turn)(float* x, const float* cos, const float* sin, int64_t half, int64_t size, float factor);
    void (*gated[2])(const float* gate, const float* up, int64_t n, void* y);  // by activation
};

// By what the cache keeps: fp32, bf16, fp16, int8.
struct CacheKernels {
    int64_t bytes;  // of a value
    void (*attend)(const AttendPages&);
    void (*store)(const float* x, int64_t size, int64_t step, void* out, float* scale);
};

}  // namespace halfbyte

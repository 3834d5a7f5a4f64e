// AdamW steps over many tensors in one call: adamw_32bit and adamw_8bit of src/halfbyte/kernels/reference.py.
//
// One pass over memory: 8-bit moments are expanded, updated, used and quantized again block by block, in cache.
//
// Rounding. Over 8 bits as in the reference, bit for bit. Over 32 bits the moments take fused multiply-adds, as torch's
// lerp and addcmul do on processors that have them, and are bitwise the reference's there; the square root is rounded
// correctly, which torch's is not (MKL's misses the nearest fp32 in a sixth of cases), so that a parameter may differ
// from the reference's by 2^-21 of the step's update and the last place of the parameter.

#pragma once

#include <vector>

#include "contract.h"

namespace halfbyte {

// Each constant of a step, computed in double and rounded to fp32 once.
struct Adamw {
    float decay;         // 1 - lr weight_decay
    float beta1, rest1;  // rest: 1 - beta
    float beta2, rest2;
    float correction;  // sqrt(1 - beta2^step)
    float eps;
    float rate;  // -lr / (1 - beta1^step)
};

struct Moment8bit {
    uint8_t* codes;  // n
    float* absmax;   // one per block
};

// One tensor: n values of `type`, their gradients, of the same type, and their moments m and v.
template <class Moment>
struct Stepped {
    void* param;
    const void* grad;
    Moment m, v;
    int64_t n;
    Type type;
};
using Stepped32bit = Stepped<float*>;
using Stepped8bit = Stepped<Moment8bit>;

// Ranks among the midpoints of a table by arithmetic instead of search.
//
// Within a decade the values of a dynamic map are evenly spaced, and the wider the higher the decade. So the points
// (midpoint k, k + 1/2), counted from zero upwards, lie on a concave polygon: the smallest of a few lines at |x|,
// rounded to an integer, is the number of midpoints below |x|. Only the largest midpoint lies off and is compared for
// itself, and only within kDoubt of a half could rounding errors decide; there, as for NaN, the tree is searched. The
// lines rise, so that it is enough to find each midpoint less than kDoubt off (fit_lines), and no table is misread: one
// that does not lie so is searched throughout. Scaled values that rounding takes beyond 1 need no clamping: no midpoint
// is there.
constexpr int kLines = 16;
constexpr float kDoubt = 0x1p-12f;
constexpr float kTiny = 0x1p-31f;    // the first binade that has lines; no midpoint is in it
constexpr float kRound = 0x1.8p23f;  // an fp32 value added to this is rounded to an integer, in the low bits

struct Lines {
    float slope[kLines + 2], intercept[kLines + 2];  // by rising |x|; the last is repeated. NaN: search throughout
    int count;
    int32_t first[32];  // of the three lines that suffice in each binade, by the exponent's low five bits
    float zero;         // the rank of zero: the midpoints below it, each the negative of one above it, or 0
    float last;         // the largest midpoint
};

struct Table8bit {
    float value[256];
    uint16_t low[256], high[256];  // the halves of each value
    Search8 search;
    Lines lines;
};

struct Tables8bit {
    const Table8bit &m, &v;
    int64_t blocksize;
};

// A tier's share.
struct AdamwKernels {
    void (*step_32bit)(const Adamw&, const Stepped32bit&, int64_t first, int64_t last);  // the values [first, last)
    void (*step_8bit)(const Adamw&, const Tables8bit&, const Stepped8bit&, int64_t first, int64_t last);  // the blocks
};

extern const AdamwKernels scalar_adamw, avx2_adamw, avx512_adamw, neon_adamw;

// The lines of the 256 values that have these 255 midpoints, ascending.
Lines fit_lines(const std::vector<float>& midpoints);

void adamw_32bit(const AdamwKernels&, const Adamw&, const std::vector<Stepped32bit>& tensors, int threads);
void adamw_8bit(const AdamwKernels&, const Adamw&, const Tables8bit&, const std::vector<Stepped8bit>& tensors,
                int threads);

namespace {

constexpr float kLargest = 0x1.fffffep127f;  // finite fp32 value

constexpr int64_t kMostInBlock = 2048;  // what a vector tier has room for

// The end of those blocks in [first, last) that a vector tier takes itself.
inline int64_t vector_blocks(int64_t blocksize, int64_t n, int64_t first, int64_t last) {
    const int64_t whole = blocksize % 32 || blocksize > kMostInBlock ? 0 : n / blocksize;
    return whole < first ? first : whole < last ? whole : last;
}

// Find the codes of the scaled values x in these lanes.
inline void search(const Search8& tree, const float* x, uint32_t lanes, uint8_t* codes) {
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        codes[lane] = static_cast<uint8_t>(nearest(tree, clamp(x[lane])));
    }
}

}  // namespace
}  // namespace halfbyte

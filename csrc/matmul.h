// Products with a 4-bit weight W[N, K]: y[M, N] = x[M, K] Wᵀ + bias, and the gradient dx[M, K] = dy[M, N] W.
//
// Both are one product, `rows` x `depth` times `depth` x `width`. W is never whole in memory: a strip of columns and a
// block of the depth at a time is expanded into a panel that stays in cache, in the layout that the inner product reads.
// A panel's lanes are 32 bits wide: one fp32 value, or, where the chip multiplies bf16, two values that follow each other
// along the depth (the layout of AMX's tiles too). For few rows, where expanding is the work, rows of W are expanded as
// they lie and multiplied at once, without a panel.
//
// Weights are those of dequantize_4bit, rounded to the type of x, except that a chip's bf16 unit takes subnormal ones for
// zero. Sums are fp32. Each result is summed in an order that depends on the tier, the type, the depth and on whether the
// call has few rows: never on the number of threads or on what other rows there are.

#pragma once

#include "contract.h"

namespace halfbyte {

constexpr int64_t kStrip = 64;   // columns of a panel
constexpr int64_t kLanes = 512;  // depth of a panel in lanes: 128 KiB, half of a small L2 cache
constexpr int64_t kVector = 16;  // lanes of x are padded with zeros to a multiple of this where it is said

// Quotients by a number that is mostly a power of two.
class Divisor {
  public:
    Divisor() = default;
    explicit Divisor(int64_t value) : value_(value) {
        while (shift_ < 62 && int64_t{1} << shift_ < value) ++shift_;
        power_ = int64_t{1} << shift_ == value;
    }
    int64_t value() const { return value_; }
    int64_t quotient(int64_t n) const { return power_ ? n >> shift_ : n / value_; }

  private:
    int64_t value_ = 1;
    int shift_ = 0;
    bool power_ = true;
};

struct Weight4bit {
    const uint8_t* codes;
    float code[16];
    Scales scales;
    int64_t rows, columns;  // N, K
    Divisor blocksize, nested_blocksize;
    bool aligned;  // 32 values from a multiple of 32 in a row on are of one block and begin with a byte

    float scale(int64_t block) const {
        if (!scales.nested) return load<float>(scales.absmax, block);
        const float value = scales.nested_code[load<uint8_t>(scales.absmax, block)];
        return value * load<float>(scales.nested_absmax, nested_blocksize.quotient(block)) + scales.offset;
    }
};

// A tier's share, for one storage type of x and y. Pointers to float are aligned to 64 bytes.
struct MatmulKernels {
    bool pairs;        // a lane holds two bf16 values; otherwise one fp32
    int64_t few_rows;  // up to so many rows go through `dot`

    // Fill the panel with the columns [column, column + kStrip) of Wᵀ (forward) or W (gradient), zero beyond the last,
    // from `first` to `last` of the depth, an odd end padded with zero.
    void (*expand_forward)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);
    void (*expand_gradient)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);

    // sums[r][0 .. kStrip) = (add ? sums : 0) + x[r] panel, for up to kTileRows rows of x, `stride` bytes apart.
    void (*multiply)(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, float* sums,
                     bool add);

    // The same for the rows [column, column + columns) of W, at most kStrip, from `first` to `last` of the depth, without
    // a panel. x is padded (kVector).
    void (*dot)(const Weight4bit& w, int64_t column, int64_t columns, int64_t first, int64_t last, const void* x,
                int64_t stride, int64_t rows, float* sums, bool add);

    // Convert n values to fp32; up to kVector - 1 more are written.
    void (*widen)(const void* x, int64_t n, float* out);

    // y[0 .. n) = sums + bias, n <= kStrip.
    void (*finish)(const float* sums, const float* bias, int64_t n, void* y);
};

constexpr int64_t kTileRows = 6;

struct Matmul4bit {
    const void* x;  // rows x depth values of `type`
    int64_t rows;
    Type type;
    bool gradient;
    Weight4bit weight;
    const void* bias;  // width values of `type`, or null
    void* y;           // out: rows x width values of `type`
};

void matmul(const MatmulKernels& kernels, const Matmul4bit& arguments, int threads);

// The kernels of a tier for this chip.
const MatmulKernels* avx2_matmul(Type type);
const MatmulKernels* avx512_matmul(Type type);

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int code_at(const uint8_t* codes, int64_t i) { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }

}  // namespace
}  // namespace halfbyte

// Products with a 4-bit weight W[N, K]: y[M, N] = x[M, K] Wᵀ + bias, and the gradient dx[M, K] = dy[M, N] W.
//
// Both are one product, `rows` x `depth` times `depth` x `width`. W is never whole in memory: a strip of columns and
// a block of the depth at a time is expanded into a panel that stays in cache, in the layout that the inner product
// reads. A panel's lanes are 32 bits wide: one fp32 value, or, where the chip multiplies bf16, two values that follow
// each other along the depth (the layout of AMX's tiles too). For few rows, where expanding is the work, rows of W
// are expanded in the order that comes for nothing, which x is given once, and multiplied without a panel.
//
// Weights are those of dequantize_4bit, rounded to the type of x, except that a chip's bf16 unit takes subnormal
// values for zero, also among its results. Sums are fp32. Each result is summed in an order that depends on the tier,
// the type, the block size, the depth and on whether the call has few rows: never on the number of threads or on what
// other rows there are.

#pragma once

#include "contract.h"

namespace halfbyte {

constexpr int64_t kStrip = 64;   // columns of a panel
constexpr int64_t kLanes = 512;  // depth of a panel in lanes: 128 KiB, half of a small L2 cache

// Few rows go along the depth in stretches, in each of which all rows of x lie one after the other, a cache line apart,
// since addresses that are a power of two apart drive each other out.
constexpr int64_t kStretchBytes = 2048;
constexpr int64_t kArrangedBytes = kStretchBytes + 64;  // of a row in a stretch

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
    Divisor blocksize, nested_blocksize;
    int64_t rows, columns;  // N, K
    // Where not 0: a power of two from 32 on, such that each piece of so many values of a row has one scale and
    // begins with a byte.
    int64_t piece;
};

// The scales of the values first, first + step, ... of the flattened weight.
void read_scales(const Weight4bit& w, int64_t first, int64_t step, int64_t count, float* out);

// A tier's products of few rows, for one storage type of x.
struct FewKernels {
    int64_t rows;   // at most
    int64_t bytes;  // of a value of x when arranged

    // Bring x into the order of `dot`.
    void (*arrange)(const void* x, int64_t rows, int64_t depth, void* arranged);

    // sums[r][0 .. columns) = x[r] times the columns [column, column + columns) of Wᵀ, at most kStrip, of a W in pieces of
    // at least 64; up to 3 more are written.
    void (*dot)(const Weight4bit& w, int64_t column, int64_t columns, const void* arranged, int64_t rows, float* sums);
};

// A tier's share, for one storage type of x and y. Pointers to float are aligned to 64 bytes.
struct MatmulKernels {
    bool pairs;  // a lane holds two bf16 values; otherwise one fp32
    const FewKernels& few;

    // Fill the panel with the columns [column, column + kStrip) of Wᵀ (forward) or W (gradient), whatever beyond the
    // last, from `first` to `last` of the depth, an odd end padded with zero.
    void (*expand_forward)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);
    void (*expand_gradient)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);

    // sums[r][0 .. kStrip) = (add ? sums : 0) + x[r] panel, for up to kTileRows rows of x, `stride` bytes apart.
    void (*multiply)(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, float* sums,
                     bool add);

    // Convert n values to fp32; up to 15 more are written.
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
extern const FewKernels avx2_few_fp32, avx2_few_bf16, avx2_few_fp16;
extern const FewKernels avx512_few_pairs, avx512_few_fp32, avx512_few_bf16, avx512_few_fp16;

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int code_at(const uint8_t* codes, int64_t i) { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }

}  // namespace
}  // namespace halfbyte

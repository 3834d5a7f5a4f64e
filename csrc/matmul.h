// Products with a 4-bit weight W[N, K]: y[M, N] = x[M, K] Wᵀ + bias, and the gradient dx[M, K] = dy[M, N] W; with dense
// matrices; and sums of several such products (LoRA's terms, the layers that read one x) that are rounded once.
//
// Each is a product of `rows` x `depth` times `depth` x `width`. W is never whole in memory: a strip of columns and
// a block of the depth at a time is expanded into a panel that stays in cache, in the layout that the inner product
// reads. A panel's lanes are 32 bits wide: one fp32 value, or, where the chip multiplies bf16, two values that follow
// each other along the depth (the layout of AMX's tiles too). For few rows, where expanding is the work, rows of W
// are expanded as they lie and multiplied at once, without a panel.
//
// Weights are those of dequantize_4bit, rounded to the type of x, except that a chip's bf16 unit takes subnormal
// values for zero, also among its results. Sums are fp32. Each result is summed in an order that depends on the tier,
// the type, the width, the terms' depths and on whether the call has few rows (and the first x no gaps between them):
// never on the number of threads or on what other rows there are.

#pragma once

#include "contract.h"

namespace halfbyte {

constexpr int64_t kStrip = 64;   // columns of a panel
constexpr int64_t kLanes = 512;  // depth of a panel in lanes: 128 KiB, half of a small L2 cache
constexpr int64_t kChunk = 1056;  // rows that share a panel, at most

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

// A dense matrix of any address, row-major.
struct Dense {
    const void* values;
    Type type;
    int64_t rows, columns;
    int64_t stride;  // values from one row to the next
};

// A tier's share, for one storage type of x. Pointers to float are aligned to 64 bytes. A panel is kLanes * kStrip
// floats, arranged as the tier likes.
struct MatmulKernels {
    bool pairs;         // a lane holds two bf16 values; otherwise one fp32
    int64_t tile_rows;  // up to so many rows go through `multiply` at a time; a divisor of kChunk
    int64_t few_rows;   // up to so many rows go through `dot`

    // Fill the panel with the columns [column, column + kStrip) of Wᵀ (forward) or W (gradient), whatever beyond the
    // last, from `first` to `last` of the depth, an odd end padded with zero.
    void (*expand_forward)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);
    void (*expand_gradient)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);

    // The same of a dense matrix M, rounded to the panel's values: the columns of Mᵀ (forward) or M (gradient).
    void (*dense_forward)(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel);
    void (*dense_gradient)(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel);

    // sums[r][0 .. columns) = (add ? sums : 0) + x[r] panel, for up to `tile_rows` rows of x as lanes, `stride` bytes
    // apart, and at most kStrip columns; sums[r] = sums + r * kStrip, whose other values may be overwritten.
    void (*multiply)(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, int64_t columns,
                     float* sums, bool add);

    // sums[r][0 .. columns) = x[r] times the columns [column, column + columns) of Wᵀ, at most kStrip, for up to
    // `few_rows` rows of x as they lie and a W in pieces.
    void (*dot)(const Weight4bit& w, int64_t column, int64_t columns, const void* x, int64_t rows, float* sums);

    // Convert n values to fp32; up to 15 more are written.
    void (*widen)(const void* x, int64_t n, float* out);

    // y[0 .. n) = sums + bias, n <= kStrip.
    void (*finish)(const float* sums, const float* bias, int64_t n, void* y);
};

// One term of a sum of products: x times Wᵀ (forward) or W (gradient).
struct Term {
    const void* x;         // rows x depth
    int64_t stride, step;  // values from one row of x to the next, and from one value of a row to the next
    bool gradient;
    const Weight4bit* weight;  // W; null: `dense` is W
    Dense dense;

    int64_t depth() const {
        if (weight) return gradient ? weight->rows : weight->columns;
        return gradient ? dense.rows : dense.columns;
    }
};

// y = bias + the sum of the terms, rounded once.
struct Matmul {
    const MatmulKernels *kernels, *y_kernels;  // of the type of every x; of the type of y and bias
    Type type, y_type;
    int64_t rows, width;
    Term* terms;
    int count;
    const void* bias;  // width values, or null
    void* y;           // out: rows x width values
    int64_t y_stride;  // values from one row of y to the next
};

// All of them in one parallel region. Left factors whose rows are scattered (a step that is not 1) are replaced by
// copies.
void matmul(Matmul* products, int count, int threads);

// The kernels of a tier for this chip.
const MatmulKernels* avx2_matmul(Type type);
const MatmulKernels* avx512_matmul(Type type);
const MatmulKernels* neon_matmul(Type type);

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int code_at(const uint8_t* codes, int64_t i) { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }

}  // namespace
}  // namespace halfbyte

// Products with a 4-bit weight W[N, K]: y[M, N] = x[M, K] Wᵀ + bias, and the gradient dx[M, K] = dy[M, N] W; with 8-bit
// weights and dense matrices; and sums of several such products (LoRA's terms, the layers that read one x) that are
// rounded once.
//
// Each is a product of `rows` x `depth` times `depth` x `width`. W is never whole in memory: a strip of columns and
// a block of the depth at a time is expanded into a panel that stays in cache, in the layout that the inner product
// reads. A panel's lanes are 32 bits wide: one fp32 value, or, where the chip multiplies bf16, two values that follow
// each other along the depth (the layout of AMX's tiles too). For few rows, where expanding is the work, rows of W
// are expanded in the order that comes for nothing, which x is given once, and multiplied without a panel.
//
// Weights are those of dequantize_4bit, rounded to the type of x, except that a chip's bf16 unit (VDPBF16PS, AMX's
// tiles) takes subnormal values for zero, also among its results. Sums are fp32. Each result is summed in an order that
// depends on the tier, the type, the width, the block size, the terms' depths and on whether the call has few rows (and
// the first x no gaps between them): never on the number of threads or on what other rows there are.

#pragma once

#include "contract.h"

namespace halfbyte {

constexpr int64_t kStrip = 64;   // columns of a panel
constexpr int64_t kLanes = 512;  // depth of a panel in lanes: 128 KiB, half of a small L2 cache
constexpr int64_t kTile = 16;    // rows and lanes of a tile of packed x
constexpr int64_t kTileBytes = kTile * kTile * 4;
constexpr int64_t kChunk = 1056;  // rows that share a panel, at most

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

// Where not 0: a power of two from 32 on, such that each piece of so many values of a row has one scale and begins with
// a byte.
inline int64_t piece_of(int64_t blocksize, int64_t columns) {
    const int64_t largest = (blocksize | columns) & -(blocksize | columns);  // power of two that divides both
    return largest >= 32 ? largest : 0;
}

struct Weight4bit {
    const uint8_t* codes;
    float code[16];
    Scales scales;
    Divisor blocksize, nested_blocksize;
    int64_t rows, columns;  // N, K
    int64_t piece;          // see piece_of
};

// The scales of the values first, first + step, ... of the flattened weight.
void read_scales(const Weight4bit& w, int64_t first, int64_t step, int64_t count, float* out);

// A weight in whole bytes: each value is its code times absmax / 127 of its block.
struct Weight8bit {
    const int8_t* codes;
    const float* absmax;  // one per block
    Divisor blocksize;
    int64_t rows, columns;  // N, K
    int64_t piece;          // as that of Weight4bit

    float scale(int64_t i) const { return load<float>(absmax, blocksize.quotient(i)) / 127.0f; }
};

void read_scales(const Weight8bit& w, int64_t first, int64_t step, int64_t count, float* out);

// A dense matrix of any address, row-major.
struct Dense {
    const void* values;
    Type type;
    int64_t rows, columns;
    int64_t stride;  // values from one row to the next
};

// A tier's products of few rows, for one storage type of x.
struct FewKernels {
    int64_t rows;    // at most
    int64_t bytes;   // of a value of x when arranged
    bool stretched;  // whether x is arranged in stretches; otherwise rows follow each other as they lie

    // Bring x into the order of `dot`.
    void (*arrange)(const void* x, int64_t rows, int64_t depth, void* arranged);

    // sums[r][0 .. columns) = x[r] times the columns [column, column + columns) of Wᵀ, at most kStrip, of a W in pieces
    // of at least 64; up to 7 more are written.
    void (*dot)(const Weight4bit& w, int64_t column, int64_t columns, const void* arranged, int64_t rows, float* sums);

    // The same of a weight in bytes, in pieces of at least 32.
    void (*arrange_bytes)(const void* x, int64_t rows, int64_t depth, void* arranged);
    void (*dot_bytes)(const Weight8bit& w, int64_t column, int64_t columns, const void* arranged, int64_t rows,
                      float* sums);

    // The same of a dense W in the type of x, whose rows lie without gaps and have a multiple of 32 values.
    void (*dot_dense)(const Dense& w, int64_t column, int64_t columns, const void* arranged_bytes, int64_t rows,
                      float* sums);
};

// A tier's share, for one storage type of x. Pointers to float are aligned to 64 bytes. A panel takes kStrip
// floats for each lane of its depth, rounded up to 16 lanes, arranged as the tier likes; what fills and what multiplies
// it is told the same depth.
struct MatmulKernels {
    bool pairs;         // a lane holds two bf16 values; otherwise one fp32
    int64_t tile_rows;  // up to so many rows go through `multiply` at a time; a divisor of kChunk
    const FewKernels* few;

    // Fill the panel with the columns [column, column + kStrip) of Wᵀ (forward) or W (gradient), whatever beyond the
    // last, from `first` to `last` of the depth, an odd end padded with zero.
    void (*expand_forward)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);
    void (*expand_gradient)(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel);

    // The same of a dense matrix M, rounded to the panel's values: the columns of Mᵀ (forward) or M (gradient).
    void (*dense_forward)(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel);
    void (*dense_gradient)(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel);

    // The same of a weight in bytes.
    void (*bytes_forward)(const Weight8bit& w, int64_t column, int64_t first, int64_t last, float* panel);
    void (*bytes_gradient)(const Weight8bit& w, int64_t column, int64_t first, int64_t last, float* panel);

    // sums[r][0 .. columns) = (add ? sums : 0) + x[r] panel, for up to `tile_rows` rows of x as lanes, `stride` bytes
    // apart, and at most kStrip columns; sums[r] = sums + r * kStrip, whose other values may be overwritten.
    void (*multiply)(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, int64_t columns,
                     float* sums, bool add);

    // Convert n values to fp32; up to 15 more are written.
    void (*widen)(const void* x, int64_t n, float* out);

    // y[0 .. n) = sums + bias, n <= kStrip.
    void (*finish)(const float* sums, const float* bias, int64_t n, void* y);

    // For a tier that multiplies in tiles of x, and whose panels are kStrip floats for each lane; otherwise null. Copy
    // up to kTile rows of x, `stride` bytes apart, into ceil(depth / 2 kTile) tiles that follow each other along the
    // depth, padded with zeros.
    void (*pack)(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tiles) = nullptr;

    // As `multiply`, for any number of such rows, each kTile of them `stride` bytes after those before.
    void (*multiply_packed)(const void* tiles, int64_t stride, int64_t rows, const float* panel, int64_t lanes,
                            int64_t columns, float* sums, bool add) = nullptr;

    // For a unit with a state of its own, otherwise null: what a thread calls before it multiplies and after, between
    // which the operating system has that state to save. See Multiplying.
    void (*begin)() = nullptr;
    void (*end)() = nullptr;
};

// While this lives, its thread may call `multiply` and `multiply_packed`.
class Multiplying {
  public:
    explicit Multiplying(const MatmulKernels& kernels) : kernels_(kernels) {
        if (kernels_.begin) kernels_.begin();
    }
    ~Multiplying() {
        if (kernels_.end) kernels_.end();
    }
    Multiplying(const Multiplying&) = delete;
    Multiplying& operator=(const Multiplying&) = delete;

  private:
    const MatmulKernels& kernels_;
};

// One term of a sum of products: x times Wᵀ (forward) or W (gradient).
struct Term {
    const void* x;         // rows x depth
    int64_t stride, step;  // values from one row of x to the next, and from one value of a row to the next
    bool gradient;
    const Weight4bit* weight;  // W, or null
    const Weight8bit* bytes;   // W, or null
    Dense dense;               // W where both are null

    int64_t depth() const { return weight ? side(*weight) : bytes ? side(*bytes) : side(dense); }
    template <class Factor>
    int64_t side(const Factor& w) const {
        return gradient ? w.rows : w.columns;
    }
};

// y = bias + the sum of the terms, rounded once.
struct Matmul {
    const MatmulKernels *kernels, *y_kernels;  // of the type of every x; of the type of y and bias
    Type type, y_type;
    int64_t rows, width;
    Term* terms;
    int count;
    const void* bias;      // width values, or null
    void* y;               // out: rows x width values
    int64_t y_stride;      // values from one row of y to the next
    bool as_many = false;  // whether few rows are summed in the order of many
};

// All of them in one parallel region. Left factors whose rows are scattered (a step that is not 1) are replaced by
// copies.
void matmul(Matmul* products, int count, int threads);

// The kernels of a tier for this chip.
const MatmulKernels* avx2_matmul(Type type);
const MatmulKernels* avx512_matmul(Type type);
const MatmulKernels* amx_matmul(Type type);
const MatmulKernels* neon_matmul(Type type);
extern const FewKernels avx2_few_fp32, avx2_few_bf16, avx2_few_fp16;
extern const FewKernels avx512_few_pairs, avx512_few_fp32, avx512_few_bf16, avx512_few_fp16;

namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int code_at(const uint8_t* codes, int64_t i) { return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4; }

}  // namespace
}  // namespace halfbyte

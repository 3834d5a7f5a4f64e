// Products: each element within its bound of the sum of the terms' products in double, whose right factors are
// dequantized and rounded to the type of x, and bit for bit the same for every number of threads.

#include <deque>

#include "case.h"

namespace halfbyte {
namespace {

// One term: x, a 4-bit or dense W, and what W is, depth x width, in double.
struct Factors {
    int64_t depth, stride;  // of x
    bool gradient, quantized;
    int64_t rows, columns;  // of W
    int64_t dense_stride;
    Type dense_type;
    int64_t blocksize, blocks;
    Buffer x, values;
    std::vector<float> code;
    Statistics statistics;
    Weight4bit weight;
    std::vector<double> factor;

    Factors(Case& c, Type type, int64_t x_rows, int64_t width, int64_t most)
        : depth(c.note("depth", c.random.once_in(2) ? 1 + c.random.below(most) : 32 * (1 + c.random.below(most) / 32))),
          stride(depth + c.note("x_gap", c.random.once_in(3) ? c.random.below(9) : 0)),
          gradient(c.note("gradient", c.random.once_in(2))),
          quantized(c.note("quantized", !c.random.once_in(3))),
          rows(gradient ? depth : width),
          columns(gradient ? width : depth),
          dense_stride(columns + c.note("gap", c.random.once_in(3) ? c.random.below(9) : 0)),
          dense_type(c.type()),
          blocksize(c.blocksize()),
          blocks((rows * columns + blocksize - 1) / blocksize),
          x(x_rows > 0 ? ((x_rows - 1) * stride + depth) * size_of(type) : 0, c.shift(), 0),
          values(quantized ? c.bytes((rows * columns + 1) / 2, c.shift())
                           : Buffer(((rows - 1) * dense_stride + columns) * size_of(dense_type), c.shift(), 0)),
          code(table_of(c, 16)),
          statistics(c, blocks, false),
          weight{values.data, {}, statistics.scales, Divisor(blocksize), Divisor(statistics.size), rows, columns, 0},
          factor(static_cast<size_t>(depth * width)) {
        std::memcpy(weight.code, code.data(), sizeof weight.code);
        const int64_t piece = (blocksize | columns) & -(blocksize | columns);
        weight.piece = piece >= 32 ? piece : 0;
        for (int64_t i = 0; i < x.size / size_of(type); ++i) put(x.data, i, type, c.random.normal());
        if (c.note("special", c.random.once_in(4))) {
            for (int64_t i = c.random.of({1, 3, 99}); i > 0 && x.size > 0; --i) {
                put(x.data, c.random.below(x.size / size_of(type)), type, c.random.of({kInfinity, -kInfinity, kNaN}));
            }
        }
        for (int64_t i = 0; !quantized && i < values.size / size_of(dense_type); ++i) {
            put(values.data, i, dense_type, c.random.normal());
        }
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const int64_t i = row * columns + column;
                const float value =
                    quantized ? code[static_cast<size_t>(code_at(values.data, i))] * statistics.of(i / blocksize)
                              : get(values.data, row * dense_stride + column, dense_type);
                float stored = 0;
                put(&stored, 0, type, value);
                factor[static_cast<size_t>(gradient ? i : column * width + row)] = get(&stored, 0, type);
            }
        }
    }

    Term term() const {
        return {x.data, stride, gradient, quantized ? &weight : nullptr,
                {values.data, dense_type, rows, columns, dense_stride}};
    }
};

// Each element within the rounding to its type, and 2e-6 of the sum of magnitudes for the sums in fp32, of the sum of
// products in double. Where that is NaN or infinite so must be y.
void close(const Case& c, const Buffer& y, int64_t y_stride, Type y_type, const std::deque<Factors>& terms, Type type,
           const Buffer* bias, int64_t rows, int64_t width) {
    std::vector<double> sums(static_cast<size_t>(width)), sizes(sums.size());
    for (int64_t r = 0; r < rows; ++r) {
        for (size_t i = 0; i < sums.size(); ++i) {
            sums[i] = bias ? get(bias->data, static_cast<int64_t>(i), y_type) : 0.0;
            sizes[i] = std::abs(sums[i]);
        }
        for (const Factors& term : terms) {
            for (int64_t k = 0; k < term.depth; ++k) {
                const double x = get(term.x.data, r * term.stride + k, type);
                const double* const row = term.factor.data() + k * width;
                for (size_t i = 0; i < sums.size(); ++i) {
                    sums[i] += x * row[i];
                    sizes[i] += std::abs(x * row[i]);
                }
            }
        }
        for (size_t i = 0; i < sums.size(); ++i) {
            const int64_t place = r * y_stride + static_cast<int64_t>(i);
            const double got = get(y.data, place, y_type), expected = sums[i];
            const double bound = 1.01 * rounding(expected, y_type) + 2e-6 * sizes[i];
            const bool right = std::isfinite(expected) ? std::abs(got - expected) <= bound
                                                       : got == expected || (got != got && expected != expected);
            if (!right) c.require(false, c.differ("y", place, got, expected));
        }
    }
}

}  // namespace

void matmul(Case& c) {
    const Type type = c.type(), y_type = c.random.once_in(2) ? type : c.type();
    const MatmulKernels &kernels = *c.tier.matmul(type), &out = *c.tier.matmul(y_type);
    const int64_t rows = c.note("rows", c.random.below(c.random.of({10, 20, 20, 300})));
    const int64_t most = c.random.of({70, 300, 2600});  // of the depth
    int64_t width = 1 + c.random.below(100000 / most);
    if (c.random.once_in(2)) width = (width + 31) / 32 * 32;
    c.note("width", width);
    std::deque<Factors> terms;
    std::vector<Term> views;
    for (int64_t i = c.note("terms", c.random.of({1, 1, 2, 3, 6})); i > 0; --i) {
        terms.emplace_back(c, type, rows, width, most);
        views.push_back(terms.back().term());
    }
    Buffer bias(width * size_of(y_type), c.shift(), 0);
    for (int64_t i = 0; i < width; ++i) put(bias.data, i, y_type, c.random.normal());
    const bool biased = c.note("bias", c.random.once_in(2));
    const int64_t y_stride = width + c.note("y_gap", c.random.once_in(3) ? c.random.below(9) : 0);
    const int64_t size = rows ? ((rows - 1) * y_stride + width) * size_of(y_type) : 0, shift = c.shift();
    const Buffer first(size, shift, kOurs);
    const Matmul a{rows, width, views.data(), static_cast<int>(views.size()), type, y_type, biased ? bias.data : nullptr,
                   first.data, y_stride};
    matmul(kernels, out, a, 1);
    close(c, first, y_stride, y_type, terms, type, biased ? &bias : nullptr, rows, width);
    for (int64_t i = 0; i < size; ++i) {
        const bool between = i / size_of(y_type) % y_stride >= width;
        if (between && first.data[i] != kOurs) c.require(false, c.differ("byte between rows", i, first.data[i], kOurs));
    }
    for (const int threads : {2, 3}) {
        const Buffer y(size, shift, kOurs);
        Matmul again = a;
        again.y = y.data;
        matmul(kernels, out, again, threads);
        c.same(y, first, "bytes of y on several threads");
    }
}

}  // namespace halfbyte

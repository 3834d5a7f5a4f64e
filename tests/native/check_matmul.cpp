// Products: each element within its bound of the sum of the terms' products in double, whose right factors are
// dequantized and rounded to the type of x, and bit for bit the same for every number of threads.

#include <deque>

#include "case.h"

namespace halfbyte {
namespace {

// One term: x, a 4-bit or dense W, and what W is, depth x width, in double.
struct Factors {
    int64_t depth;
    bool transposed;  // how x lies
    int64_t stride, step;
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
          transposed(c.note("transposed", c.random.once_in(5))),
          stride(transposed ? 1 : depth + c.note("x_gap", c.gap())),
          step(transposed ? x_rows + c.note("x_gap", c.gap()) : 1),
          gradient(c.note("gradient", c.random.once_in(2))),
          quantized(c.note("quantized", !c.random.once_in(3))),
          rows(gradient ? depth : width),
          columns(gradient ? width : depth),
          dense_stride(columns + c.note("gap", c.gap())),
          dense_type(c.type()),
          blocksize(c.blocksize()),
          blocks((rows * columns + blocksize - 1) / blocksize),
          x(x_rows > 0 ? ((x_rows - 1) * stride + (depth - 1) * step + 1) * size_of(type) : 0, c.shift(), 0),
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
        return {x.data, stride, step, gradient, quantized ? &weight : nullptr,
                {values.data, dense_type, rows, columns, dense_stride}};
    }
};

// A sum of terms and, apart from where a call puts it, all that it takes.
struct Sum {
    Type type, y_type;
    int64_t rows, width, y_stride, shift;
    std::deque<Factors> terms;
    bool biased;
    Buffer bias;

    explicit Sum(Case& c)
        : type(c.type()),
          y_type(c.random.once_in(2) ? type : c.type()),
          rows(c.note("rows", c.random.below(c.random.of({10, 20, 20, 300})))),
          width(c.note("width", c.random.once_in(2) ? 1 + c.random.below(400) : 32 * (1 + c.random.below(12)))),
          y_stride(width + c.note("y_gap", c.gap())),
          shift(c.shift()),
          biased(c.note("bias", c.random.once_in(2))),
          bias(width * size_of(y_type), c.shift(), 0) {
        const int64_t most = c.random.of<int64_t>({50, 300, 300, 1000000 / width / (rows + 1) + 1});  // of the depth
        for (int64_t i = c.note("terms", c.random.of({1, 1, 2, 3, 6})); i > 0; --i) {
            terms.emplace_back(c, type, rows, width, most);
        }
        for (int64_t i = 0; i < width; ++i) put(bias.data, i, y_type, c.random.normal());
    }

    Buffer poisoned() const {
        return {rows ? ((rows - 1) * y_stride + width) * size_of(y_type) : 0, shift, kOurs};
    }

    // Each element within the rounding to its type, and 2e-6 of the sum of magnitudes for the sums in fp32, of the
    // sum of products in double. Where that is NaN or infinite so must be y.
    void check(const Case& c, const Buffer& y) const {
        std::vector<double> sums(static_cast<size_t>(width)), sizes(sums.size());
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < width; ++i) {
                sums[static_cast<size_t>(i)] = biased ? get(bias.data, i, y_type) : 0.0;
                sizes[static_cast<size_t>(i)] = std::abs(sums[static_cast<size_t>(i)]);
            }
            for (const Factors& term : terms) {
                for (int64_t k = 0; k < term.depth; ++k) {
                    const double x = get(term.x.data, r * term.stride + k * term.step, type);
                    const double* const row = term.factor.data() + k * width;
                    for (size_t i = 0; i < sums.size(); ++i) {
                        sums[i] += x * row[i];
                        sizes[i] += std::abs(x * row[i]);
                    }
                }
            }
            for (int64_t i = 0; i < width; ++i) {
                const double got = get(y.data, r * y_stride + i, y_type), expected = sums[static_cast<size_t>(i)];
                const double bound = 1.01 * rounding(expected, y_type) + 2e-6 * sizes[static_cast<size_t>(i)];
                const bool right = std::isfinite(expected) ? std::abs(got - expected) <= bound
                                                           : got == expected || (got != got && expected != expected);
                if (!right) c.require(false, c.differ("y", r * y_stride + i, got, expected));
            }
        }
        for (int64_t i = 0; i < y.size; ++i) {
            const bool between = i / size_of(y_type) % y_stride >= width;
            if (between && y.data[i] != kOurs) c.require(false, c.differ("byte between rows", i, y.data[i], kOurs));
        }
    }
};

}  // namespace

void matmul(Case& c) {
    std::deque<Sum> sums;
    for (int64_t i = c.note("sums", c.random.of({1, 1, 2, 3})); i > 0; --i) sums.emplace_back(c);
    std::vector<std::vector<Buffer>> results;
    for (const int threads : {1, 2, 3}) {
        std::vector<Buffer>& ys = results.emplace_back();
        std::deque<std::vector<Term>> terms;
        std::vector<Matmul> products;
        for (const Sum& sum : sums) {
            ys.push_back(sum.poisoned());
            terms.emplace_back();
            for (const Factors& term : sum.terms) terms.back().push_back(term.term());
            products.push_back({c.tier.matmul(sum.type), c.tier.matmul(sum.y_type), sum.type, sum.y_type, sum.rows,
                                sum.width, terms.back().data(), static_cast<int>(terms.back().size()),
                                sum.biased ? sum.bias.data : nullptr, ys.back().data, sum.y_stride});
        }
        matmul(products.data(), static_cast<int>(products.size()), threads);
    }
    for (size_t i = 0; i < sums.size(); ++i) {
        sums[i].check(c, results[0][i]);
        c.same(results[1][i], results[0][i], "bytes of y on two threads");
        c.same(results[2][i], results[0][i], "bytes of y on three threads");
    }
}

}  // namespace halfbyte

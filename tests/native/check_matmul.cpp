// Products: each element within its bound of the sum of the terms' products in double, whose right factors (4-bit,
// 8-bit or dense) are dequantized and rounded to the type of x, and bit for bit the same for every number of threads.

#include <cstdlib>
#include <deque>

#include "case.h"

namespace halfbyte {
namespace {

// One term: x, a W of 4 or 8 bits or (0) dense, and what W is, depth x width, in double. Of `few` rows: such as go
// without a panel, or just miss it.
struct Factors {
    int64_t depth;
    bool transposed;  // how x lies
    int64_t stride, step;
    bool gradient;
    int bits;
    int64_t rows, columns;  // of W
    int64_t dense_stride;
    Type dense_type;
    int64_t blocksize, blocks;
    Buffer x, values;
    std::vector<float> code;
    Statistics statistics;
    Buffer absmax;  // of 8 bits
    Weight4bit weight;
    Weight8bit weight8;
    std::vector<double> factor;

    Factors(Case& c, Type type, int64_t x_rows, int64_t width, int64_t most, bool few)
        : depth(c.note("depth", c.random.once_in(30)          ? 0
                                : !few && c.random.once_in(2) ? 1 + c.random.below(most)
                                                              : 32 * (1 + c.random.below(most) / 32))),
          transposed(c.note("transposed", !few && c.random.once_in(5))),
          stride(transposed ? 1 : depth + c.note("x_gap", few ? 0 : c.gap())),
          step(transposed ? x_rows + c.note("x_gap", c.gap()) : 1),
          gradient(c.note("gradient", !few && c.random.once_in(2))),
          bits(c.note("bits", few ? c.random.of({4, 8}) : c.random.of({4, 4, 4, 8, 8, 0}))),
          rows(gradient ? depth : width),
          columns(gradient ? width : depth),
          dense_stride(columns + c.note("gap", c.gap())),
          dense_type(c.type()),
          blocksize(few ? c.note("blocksize", c.random.of<int64_t>({64, 128, 32, 4096})) : c.blocksize()),
          blocks((rows * columns + blocksize - 1) / blocksize),
          x(x_rows && depth ? ((x_rows - 1) * stride + (depth - 1) * step + 1) * size_of(type) : 0, c.shift(), 0),
          values(bits ? c.bytes((rows * columns * bits + 7) / 8, c.shift())
                      : Buffer(rows ? ((rows - 1) * dense_stride + columns) * size_of(dense_type) : 0, c.shift(), 0)),
          code(table_of(c, 16)),
          statistics(c, blocks, false),
          absmax(c.floats(blocks, 0, 0.1f, 1.0f)),
          weight{values.data, {}, statistics.scales, Divisor(blocksize), Divisor(statistics.size), rows, columns, 0},
          weight8{reinterpret_cast<const int8_t*>(values.data),
                  absmax.floats(),
                  Divisor(blocksize),
                  rows,
                  columns,
                  piece_of(blocksize, columns)},
          factor(static_cast<size_t>(depth * width)) {
        std::memcpy(weight.code, code.data(), sizeof weight.code);
        weight.piece = piece_of(blocksize, columns);
        for (int64_t i = 0; i < x.size / size_of(type); ++i) put(x.data, i, type, c.random.normal());
        if (c.note("special", c.random.once_in(4))) {
            for (int64_t i = c.random.of({1, 3, 99}); i > 0 && x.size > 0; --i) {
                put(x.data, c.random.below(x.size / size_of(type)), type, c.random.of({kInfinity, -kInfinity, kNaN}));
            }
        }
        for (int64_t i = 0; !bits && i < values.size / size_of(dense_type); ++i) {
            put(values.data, i, dense_type, c.random.normal());
        }
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const int64_t i = row * columns + column;
                float stored = 0;
                put(&stored, 0, type, value(row, column));
                factor[static_cast<size_t>(gradient ? i : column * width + row)] = get(&stored, 0, type);
            }
        }
    }

    float value(int64_t row, int64_t column) const {
        const int64_t i = row * columns + column;
        if (bits == 4) return code[static_cast<size_t>(code_at(values.data, i))] * statistics.of(i / blocksize);
        if (bits == 8) return weight8.codes[i] * (absmax.floats()[i / blocksize] / 127.0f);
        return get(values.data, row * dense_stride + column, dense_type);
    }

    Term term() const {
        return {x.data,
                stride,
                step,
                gradient,
                bits == 4 ? &weight : nullptr,
                bits == 8 ? &weight8 : nullptr,
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

    explicit Sum(Case& c, bool few = false)
        : type(c.type()),
          y_type(c.random.once_in(2) ? type : c.type()),
          rows(c.note("rows", few                    ? 1 + c.random.below(17)
                              : c.random.once_in(30) ? 500 + c.random.below(700)
                                                     : c.random.below(c.random.of({10, 20, 20, 300})))),
          width(c.note("width", c.random.once_in(2) ? 1 + c.random.below(400) : 32 * (1 + c.random.below(12)))),
          y_stride(width + c.note("y_gap", c.gap())),
          shift(c.shift()),
          biased(c.note("bias", c.random.once_in(2))),
          bias(width * size_of(y_type), c.shift(), 0) {
        const int64_t most = c.random.of<int64_t>({50, 300, 300, rows < 500 ? 1000000 / width / (rows + 1) + 1 : 1500});
        for (int64_t i = c.note("terms", c.random.of({1, 1, 2, 3, 6})); i > 0; --i) {
            const bool first = few && terms.empty();
            const int64_t deepest = first ? least(600000 / width / (rows + 1) + 65, 3300) : most;
            terms.emplace_back(c, type, rows, width, deepest, first);
        }
        for (int64_t i = 0; i < width; ++i) put(bias.data, i, y_type, c.random.normal());
    }

    Buffer poisoned() const { return {rows ? ((rows - 1) * y_stride + width) * size_of(y_type) : 0, shift, kOurs}; }

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

namespace {

void check_sums(Case& c, const std::deque<Sum>& sums) {
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

// Whole floats at an address that is a multiple of 64, of exactly that size.
struct Floats {
    Floats(int64_t n, int fill)
        : size(static_cast<size_t>(n) * 4), data(static_cast<float*>(std::aligned_alloc(64, size))) {
        std::memset(data, fill, size);
    }
    ~Floats() { std::free(data); }
    size_t size;
    float* data;
};

}  // namespace

void matmul(Case& c) {
    std::deque<Sum> sums;
    for (int64_t i = c.note("sums", c.random.of({1, 1, 2, 3})); i > 0; --i) sums.emplace_back(c);
    check_sums(c, sums);
}

// Sums whose first term is a product of few rows with a quantized weight.
void few(Case& c) {
    std::deque<Sum> sums;
    sums.emplace_back(c, true);
    check_sums(c, sums);
}

// A panel from a dense matrix, and rows of x, as attention multiplies them: nothing beyond the rows, the lanes and the
// depth is read or written. Packed rows, of any number, give the same bytes.
void multiply(Case& c) {
    const Type type = c.type();
    const MatmulKernels& k = *c.tier.matmul(type);
    const Type lane_type = k.pairs ? Type::bf16 : Type::fp32;
    const int64_t per_lane = k.pairs ? 2 : 1, rows = c.note("rows", 1 + c.random.below(k.pack ? 100 : k.tile_rows));
    const int64_t columns = c.note("columns", 1 + c.random.below(kStrip));
    const int64_t depth = c.note("depth", 1 + c.random.below(c.random.of({40, 300, int(kLanes * per_lane)})));
    const int64_t lanes = (depth + per_lane - 1) / per_lane, stride = 4 * (lanes + c.note("gap", c.gap()));
    const bool gradient = c.note("gradient", c.random.once_in(2)), add = c.note("add", c.random.once_in(2));

    const Buffer values = c.values(columns * depth, type, false);
    const Dense dense{values.data, type, gradient ? depth : columns, gradient ? columns : depth,
                      gradient ? columns : depth};
    const Floats panel((lanes + 15) / 16 * 16 * kStrip, 0xff);  // NaN
    (gradient ? k.dense_gradient : k.dense_forward)(dense, 0, 0, depth, panel.data);

    const Buffer x((rows - 1) * stride + 4 * lanes, c.shift(), 0xff);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < lanes * per_lane; ++i) {
            put(x.data + r * stride, i, lane_type, i < depth ? c.random.normal() : 0.0f);
        }
    }
    const Floats before(rows * kStrip, 0), sums(rows * kStrip, 0xff);
    for (int64_t i = 0; i < rows * kStrip; ++i) before.data[i] = c.random.normal();
    if (add) std::memcpy(sums.data, before.data, sums.size);
    const Multiplying unit(k);
    for (int64_t r = 0; r < rows; r += k.tile_rows) {
        k.multiply(x.data + r * stride, stride, least(k.tile_rows, rows - r), panel.data, lanes, columns,
                   sums.data + r * kStrip, add);
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; ++i) {
            double sum = add ? before.data[r * kStrip + i] : 0.0, size = std::abs(sum);
            // each term may be lost beside what it is added to; a bf16 unit takes subnormal products for zero
            const double lost = static_cast<double>(depth) * (0x1p-24 * size + 0x1p-125);
            for (int64_t n = 0; n < depth; ++n) {
                const double term = double{get(x.data + r * stride, n, lane_type)} *
                                    get(values.data, gradient ? n * columns + i : i * depth + n, type);
                sum += term;
                size += std::abs(term);
            }
            const double got = sums.data[r * kStrip + i];
            const bool right = size > 3e38 || std::abs(got - sum) <= 2e-6 * size + lost;
            c.require(right, right ? "" : c.differ("sums", r * kStrip + i, got, sum));
        }
    }
    if (!k.pack) return;
    const int64_t row_bytes = (depth + 2 * kTile - 1) / (2 * kTile) * kTileBytes;
    const Floats tiles((rows + kTile - 1) / kTile * row_bytes / 4, 0xff), packed(rows * kStrip, 0xff);
    for (int64_t r = 0; r < rows; r += kTile) {
        k.pack(x.data + r * stride, stride, least(kTile, rows - r), depth, tiles.data + r / kTile * row_bytes / 4);
    }
    if (add) std::memcpy(packed.data, before.data, packed.size);
    k.multiply_packed(tiles.data, row_bytes, rows, panel.data, lanes, columns, packed.data, add);
    for (int64_t r = 0; r < rows; ++r) {
        const bool same =
            !std::memcmp(packed.data + r * kStrip, sums.data + r * kStrip, static_cast<size_t>(columns) * 4);
        c.require(same, "packed rows give other sums");
    }
}

}  // namespace halfbyte

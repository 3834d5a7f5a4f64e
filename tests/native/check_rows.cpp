// Element-wise kernels (rows.h) against their formulas in double, within the type's rounding and what fp32 loses.

#include "case.h"
#include "rows.h"

namespace halfbyte {
namespace {

Buffer uniform(Case& c, int64_t n, Type type, float most) {
    Buffer x(n * size_of(type), c.shift(), 0);
    for (int64_t i = 0; i < n; ++i) put(x.data, i, type, c.random.uniform(-most, most));
    return x;
}

// `rows` rows of `width` values, perhaps with a gap between them, no byte more.
struct Table {
    int64_t stride;
    Type type;
    Buffer buffer;

    Table(Case& c, int64_t rows, int64_t width, Type type, float most)
        : stride(width + c.gap()), type(type), buffer(uniform(c, rows ? (rows - 1) * stride + width : 0, type, most)) {}
    Rows rows() const { return {buffer.data, stride}; }
    double at(int64_t row, int64_t i) const { return get(buffer.data, row * stride + i, type); }
};

void close(Case& c, const char* name, const Buffer& got, int64_t i, Type type, double expected, double terms = 1) {
    const double value = get(got.data, i, type), bound = 1.01 * rounding(expected, type) + 4e-6 * terms;
    if (!(std::abs(value - expected) <= bound)) c.require(false, c.differ(name, i, value, expected));
}

double sigma(double x) { return 1 / (1 + std::exp(-x)); }

template <class Arguments>
void in_ranges(Case& c, const ByType<Arguments>& kernels, Type type, const Arguments& a, int64_t count) {
    const int64_t split = count ? c.random.below(count + 1) : 0;
    kernels[static_cast<int>(type)](a, 0, split);
    kernels[static_cast<int>(type)](a, split, count);
}

}  // namespace

void rms_norm(Case& c) {
    const Type type = c.type();
    const int64_t rows = c.note("rows", c.random.below(7)), width = c.note("width", 1 + c.random.below(200));
    const bool adds = c.note("adds", c.random.once_in(2)), more = c.note("more", c.random.once_in(2));
    const float offset = c.note("offset", static_cast<float>(c.random.below(2))), eps = 1e-3f;
    const Table x(c, rows, width, type, 2), residual(c, rows, width, type, 2), weight(c, 1, width, type, 2);
    const Table dy(c, rows, width, type, 2), dh(c, rows, width, type, 2);
    const int64_t size = rows * width * size_of(type);
    const Buffer sum(adds ? size : 0, c.shift(), kOurs), y(size, c.shift(), kOurs), dx(size, c.shift(), kOurs);
    const Buffer scale(4 * rows, 0, kOurs), dweight(4 * width, 0, kOurs);
    const Rows none{nullptr, 0}, h{adds ? sum.data : x.buffer.data, adds ? width : x.stride};
    in_ranges<RmsNorm>(c, c.tier.rows->rms_norm, type,
                       {x.rows(), adds ? residual.rows() : none, weight.buffer.data, width, eps, offset, false,
                        sum.data, y.data, scale.floats()}, rows);
    in_ranges<RmsNormGradient>(c, c.tier.rows->rms_norm_gradient, type,
                               {dy.rows(), h, more ? dh.rows() : none, weight.buffer.data, scale.floats(), width,
                                offset, dx.data}, rows);
    in_ranges<RmsNormWeightGradient>(c, c.tier.rows->rms_norm_weight_gradient, type,
                                     {dy.rows(), h, scale.floats(), rows, dweight.floats()}, width);
    std::vector<double> totals(static_cast<size_t>(width));
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0, products = 0;
        const auto at = [&](int64_t i) { return double{get(h.data, row * h.stride + i, type)}; };
        const auto g = [&](int64_t i) { return dy.at(row, i) * (offset + weight.at(0, i)); };
        for (int64_t i = 0; i < width; ++i) squares += at(i) * at(i), products += g(i) * at(i);
        const double s = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
        for (int64_t i = 0; i < width; ++i) {
            if (adds) close(c, "h", sum, row * width + i, type, x.at(row, i) + residual.at(row, i));
            close(c, "y", y, row * width + i, type, at(i) * s * (offset + weight.at(0, i)), 10);
            const double inner = s * (g(i) - at(i) * s * s * products / static_cast<double>(width));
            close(c, "dx", dx, row * width + i, type, inner + (more ? dh.at(row, i) : 0), 20 * s);
            totals[static_cast<size_t>(i)] += dy.at(row, i) * at(i) * s;
        }
    }
    for (int64_t i = 0; i < width; ++i) close(c, "dweight", dweight, i, Type::fp32, totals[static_cast<size_t>(i)], 20);
}

void gated(Case& c) {
    const Type type = c.type();
    const int64_t rows = c.note("rows", c.random.below(7)), width = c.note("width", 1 + c.random.below(200));
    const bool silu = c.note("silu", c.random.once_in(2));
    const Table a(c, rows, width, type, 30), b(c, rows, width, type, 2), dy(c, rows, width, type, 2);
    const int64_t stride = width + c.gap(), span = rows ? (rows - 1) * stride + width : 0;
    const Buffer y(rows * width * size_of(type), c.shift(), kOurs);
    const Buffer da(span * size_of(type), c.shift(), kOurs), db(span * size_of(type), c.shift(), kOurs);
    in_ranges<Gated>(c, c.tier.rows->gated[!silu], type, {a.rows(), b.rows(), width, y.data}, rows);
    in_ranges<GatedGradient>(c, c.tier.rows->gated_gradient[!silu], type,
                             {dy.rows(), a.rows(), b.rows(), width, da.data, db.data, stride}, rows);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; ++i) {
            const double x = a.at(row, i), factor = 2 * std::sqrt(2 / std::acos(-1.0));
            const double s = sigma(silu ? x : factor * (x + 0.044715 * x * x * x));
            const double slope = s + x * s * (1 - s) * (silu ? 1 : factor * (1 + 3 * 0.044715 * x * x));
            close(c, "y", y, row * width + i, type, x * s * b.at(row, i), 60);
            close(c, "dup", db, row * stride + i, type, dy.at(row, i) * x * s, 60);
            close(c, "dgate", da, row * stride + i, type, dy.at(row, i) * b.at(row, i) * slope, 60);
        }
    }
}

void rotary(Case& c) {
    const Type type = c.type();
    const bool wide = c.note("wide", c.random.once_in(2)), inverse = c.note("inverse", c.random.once_in(2));
    const Type angle = wide ? Type::fp32 : type;
    const int64_t samples = 1 + c.random.below(2), length = 1 + c.random.below(5), heads = 1 + c.random.below(3);
    const int64_t half = c.note("half", 1 + c.random.below(40)), size = c.note("size", 2 * half + c.random.below(20));
    const int64_t head = size + c.gap(), token = heads * head + c.gap(), sample = length * token;
    const int64_t last = (samples - 1) * sample + (length - 1) * token + (heads - 1) * head + size;
    const Buffer x = uniform(c, last, type, 1);
    const Buffer cos = uniform(c, length * 2 * half, angle, 1), sin = uniform(c, length * 2 * half, angle, 1);
    const Buffer y(samples * length * heads * size * size_of(type), c.shift(), kOurs);
    in_ranges<Rotary>(c, c.tier.rows->rotary[wide], type,
                      {x.data, sample, token, head, cos.data, sin.data, 0, 2 * half, length, heads, size, half,
                       inverse, y.data}, samples * length);
    for (int64_t i = 0; i < samples * length * heads * size; ++i) {
        const int64_t at = i % size, place = i / size / heads % length;
        const int64_t row = i / size / heads / length * sample + place * token + i / size % heads * head;
        const auto value = [&](int64_t k) { return double{get(x.data, row + k, type)}; };
        const auto turn = [&](const Buffer& of, int64_t k) { return double{get(of.data, 2 * place * half + k, angle)}; };
        const int64_t other = at < half ? at + half : at - half;
        const double sign = (at < half) == inverse ? 1 : -1;
        const double expected = at >= 2 * half ? value(at)
                                               : value(at) * turn(cos, at) +
                                                     sign * value(other) * turn(sin, inverse ? other : at);
        close(c, "y", y, i, type, expected);
    }
}

void elementary(Case& c) {
    const int64_t n = c.length();
    const Buffer x = c.floats(n, 0, -100, 88);
    const Buffer e(4 * n, 0, kOurs), s(4 * n, 0, kOurs), t(4 * n, 0, kOurs);
    c.tier.rows->exp(x.floats(), n, e.floats());
    c.tier.rows->sigmoid(x.floats(), n, s.floats());
    c.tier.rows->tanh(x.floats(), n, t.floats());
    for (int64_t i = 0; i < n; ++i) {
        const double value = x.floats()[i];
        const auto within = [&](const char* name, const Buffer& got, double expected, double units) {
            const double bound = 2 * units * rounding(expected, Type::fp32) + 1.2e-38 * (units > 2);
            c.require(std::abs(got.floats()[i] - expected) <= bound, c.differ(name, i, got.floats()[i], expected));
        };
        within("exp", e, std::exp(value), 2);
        within("sigmoid", s, sigma(value), 3);
        within("tanh", t, std::tanh(value), 3);
    }
}

}  // namespace halfbyte

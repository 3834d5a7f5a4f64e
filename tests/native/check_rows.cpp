// The kernels over rows (rows.h): each element within a bound of its formula in double. Bounds are the rounding to the
// type that is stored, and what sums in fp32 and the functions of lanes.inl may be off.

#include "case.h"
#include "rows.h"

namespace halfbyte {
namespace {

constexpr double kUnit = 0x1p-24;  // what fp32 rounds by, relatively

// rows x width random values, whose rows may have gaps.
struct Matrix {
    Type type;
    int64_t width, stride;
    Buffer values;

    Matrix(Case& c, int64_t rows, int64_t width, Type type, float scale = 1)
        : type(type),
          width(width),
          stride(width + c.note("gap", c.gap())),
          values(((rows - 1) * stride + width) * size_of(type), c.shift(), 0) {
        for (int64_t i = 0; i < values.size / size_of(type); ++i) put(values.data, i, type, c.random.normal() * scale);
    }
    Rows rows() const { return {values.data, stride}; }
    double at(int64_t row, int64_t i) const { return get(values.data, row * stride + i, type); }
};

Buffer poisoned(Case& c, int64_t n, Type type) { return {n * size_of(type), c.shift(), kOurs}; }

// fp32, where alignment is promised.
Buffer poisoned_floats(int64_t n) { return {4 * n, 0, kOurs}; }

void near(const Case& c, const char* what, int64_t i, double got, double expected, double bound) {
    const bool right = std::isfinite(expected) && std::abs(got - expected) <= bound;
    if (!right && !(got == expected)) c.require(false, c.differ(what, i, got, expected));
}

// An element of a type, `relative` of `size` and the rounding off.
void near(const Case& c, const char* what, const Buffer& out, int64_t i, Type type, double expected, double size,
          double relative) {
    const double bound = relative * size + 1e-37;
    near(c, what, i, get(out.data, i, type), expected, bound + 1.01 * rounding(std::abs(expected) + bound, type));
}

// Run a kernel in two ranges.
template <class Arguments>
void in_ranges(Case& c, void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& a, int64_t rows) {
    const int64_t split = c.note("split", c.random.below(rows + 1));
    kernel(a, 0, split);
    kernel(a, split, rows);
}

int64_t few_rows(Case& c) { return c.note("rows", 1 + c.random.below(c.random.of({3, 12}))); }
int64_t any_width(Case& c) { return c.note("width", 1 + c.random.below(c.random.of({20, 70, 700}))); }
int index_of(Type type) { return static_cast<int>(type); }

}  // namespace

void elementary(Case& c) {
    const int64_t n = c.length();
    const float size = c.note("size", c.random.of({0.5f, 3.0f, 30.0f, 200.0f}));
    const Buffer x = c.floats(n, 0, -size, size, true), y = poisoned_floats(n);
    const RowKernels& k = *c.tier.rows;
    const auto check = [&](const char* name, void (*kernel)(const float*, int64_t, float*), double (*f)(double),
                           double units, double smallest) {
        kernel(x.floats(), n, y.floats());
        for (int64_t i = 0; i < n; ++i) {
            const double got = y.floats()[i], expected = f(x.floats()[i]);
            const bool large = std::abs(expected) > 3.402823e38;
            const bool right = expected != expected ? got != got
                               : large ? got > 3.4e38
                                       : std::abs(got - expected) <= 2 * units * kUnit * std::abs(expected) + smallest;
            if (!right) c.require(false, c.differ(name, i, got, expected));
        }
    };
    check("exp", k.exp, [](double v) { return std::exp(v); }, 2, 3e-45);
    check("sigmoid", k.sigmoid, [](double v) { return 1 / (1 + std::exp(-v)); }, 3, 0x1p-126);
    check("tanh", k.tanh, [](double v) { return std::tanh(v); }, 3, 3e-45);
}

void rms_norm(Case& c) {
    const Type type = c.type();
    const int64_t rows = few_rows(c), width = any_width(c);
    const double n = static_cast<double>(width), off = (n + 16) * kUnit;
    const float offset = c.note("offset", c.random.of({0.0f, 1.0f})), eps = c.note("eps", c.random.of({1e-6f, 0.1f}));
    const bool adds = c.note("residual", c.random.once_in(2)), rounded = c.note("rounded", c.random.once_in(2));
    const Matrix x(c, rows, width, type), residual(c, rows, width, type), weight(c, 1, width, type);
    const Buffer h = poisoned(c, rows * width, type), y = poisoned(c, rows * width, type);
    const Buffer scale = poisoned_floats(rows);
    in_ranges<RmsNorm>(c, c.tier.rows->rms_norm[index_of(type)],
                       {x.rows(),
                        {adds ? residual.values.data : nullptr, residual.stride},
                        weight.values.data,
                        width,
                        eps,
                        offset,
                        rounded,
                        adds ? h.data : nullptr,
                        y.data,
                        scale.floats()},
                       rows);
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) {
            if (adds) near(c, "h", h, row * width + i, type, x.at(row, i) + residual.at(row, i), 0, 0);
            const double value = adds ? get(h.data, row * width + i, type) : x.at(row, i);
            squares += value * value;
        }
        const double s = 1 / std::sqrt(squares / n + eps);
        near(c, "scale", row, scale.floats()[row], s, off * s);
        for (int64_t i = 0; i < width; ++i) {
            const double factor = offset + weight.at(0, i);
            const double normalized = (adds ? get(h.data, row * width + i, type) : x.at(row, i)) * s;
            // rounded to either side of a tie
            const double twice = rounded ? 2 * rounding(normalized, type) * std::abs(factor) : 0;
            near(c, "y", y, row * width + i, type, normalized * factor, off * std::abs(normalized * factor) + twice, 1);
        }
    }

    const bool joins = c.note("dh", c.random.once_in(2));
    const Matrix dy(c, rows, width, type), dh(c, rows, width, type);
    const Buffer scales = c.floats(rows, 0, 0.1f, 2.0f), dx = poisoned(c, rows * width, type);
    in_ranges<RmsNormGradient>(c, c.tier.rows->rms_norm_gradient[index_of(type)],
                               {dy.rows(),
                                x.rows(),
                                {joins ? dh.values.data : nullptr, dh.stride},
                                weight.values.data,
                                scales.floats(),
                                width,
                                offset,
                                dx.data},
                               rows);
    for (int64_t row = 0; row < rows; ++row) {
        const double s = scales.floats()[row];
        double mean = 0, size = 0;
        for (int64_t i = 0; i < width; ++i) {
            const double product = dy.at(row, i) * (offset + weight.at(0, i)) * x.at(row, i) / n;
            mean += product;
            size += std::abs(product);
        }
        for (int64_t i = 0; i < width; ++i) {
            const double g = dy.at(row, i) * (offset + weight.at(0, i)), rest = joins ? dh.at(row, i) : 0;
            const double expected = rest + s * (g - x.at(row, i) * s * s * mean);
            const double most = std::abs(rest) + s * (std::abs(g) + std::abs(x.at(row, i)) * s * s * size);
            near(c, "dx", dx, row * width + i, type, expected, most, off);
        }
    }

    const Buffer dweight = poisoned_floats(width);
    in_ranges<RmsNormWeightGradient>(c, c.tier.rows->rms_norm_weight_gradient[index_of(type)],
                                     {dy.rows(), x.rows(), scales.floats(), rows, dweight.floats()}, width);
    for (int64_t i = 0; i < width; ++i) {
        double sum = 0, size = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const double product = dy.at(row, i) * x.at(row, i) * scales.floats()[row];
            sum += product;
            size += std::abs(product);
        }
        near(c, "dweight", i, dweight.floats()[i], sum, static_cast<double>(rows + 4) * kUnit * size);
    }
}

void gated(Case& c) {
    const Type type = c.type();
    const bool gelu = c.note("gelu", c.random.once_in(2));
    const int64_t rows = few_rows(c), width = any_width(c);
    const Matrix gate(c, rows, width, type, c.note("size", c.random.of({1.0f, 5.0f, 30.0f})));
    const Matrix up(c, rows, width, type), dy(c, rows, width, type);
    const int64_t stride = width + c.note("out_gap", c.gap()), last = (rows - 1) * stride + width;
    const Buffer y = poisoned(c, rows * width, type), dgate = poisoned(c, last, type), dup = poisoned(c, last, type);
    in_ranges<Gated>(c, c.tier.rows->gated[gelu][index_of(type)], {gate.rows(), up.rows(), width, y.data}, rows);
    in_ranges<GatedGradient>(c, c.tier.rows->gated_gradient[gelu][index_of(type)],
                             {dy.rows(), gate.rows(), up.rows(), width, dgate.data, dup.data, stride}, rows);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; ++i) {
            const double x = gate.at(row, i), linear = gelu ? 2 * std::sqrt(2 / std::acos(-1.0)) : 1;
            const double cubic = gelu ? 0.044715 * linear : 0, u = linear * x + cubic * x * x * x;
            const double s = 1 / (1 + std::exp(-u)), turned = x * s * (1 - s) * (linear + 3 * cubic * x * x);
            const double off = 1e-6 * (1 + std::abs(u));  // σ(u) is as far off as u,
            const double most = s + 1e-31;                // and 0 where it would be subnormal
            const double d = dy.at(row, i), by = up.at(row, i);
            near(c, "y", y, row * width + i, type, x * s * by, std::abs(x * most * by), off);
            near(c, "dup", dup, row * stride + i, type, d * x * s, std::abs(d * x * most), off);
            // 1 - σ is off by a rounding of 1
            const double size = std::abs(x * most) * (linear + 3 * cubic * x * x) * (1 - s + 1e-1) + most;
            near(c, "dgate", dgate, row * stride + i, type, d * by * (s + turned), std::abs(d * by) * size, off);
        }
        for (int64_t i = width; i < stride && row + 1 < rows; ++i) {
            for (const Buffer* out : {&dgate, &dup}) {
                const uint8_t* gap = out->data + (row * stride + i) * size_of(type);
                c.require(gap[0] == kOurs && gap[1] == kOurs, "a gap between rows was written to");
            }
        }
    }
}

void rotary(Case& c) {
    const Type type = c.type();
    const bool wide = c.note("fp32_angles", c.random.once_in(2)), inverse = c.note("inverse", c.random.once_in(2));
    const bool shared = c.note("shared", c.random.once_in(2));  // the angles, by all samples
    const Type angle = wide ? Type::fp32 : type;
    const int64_t samples = c.note("samples", 1 + c.random.below(3)), length = c.note("length", 1 + c.random.below(5));
    const int64_t heads = c.note("heads", 1 + c.random.below(4)), size = c.note("size", 1 + c.random.below(90));
    const int64_t half = c.note("half", c.random.once_in(2) ? size / 2 : c.random.below(size / 2 + 1));
    const int64_t head_stride = size + c.note("gap", c.gap()), token_stride = heads * head_stride + c.gap();
    const int64_t sample_stride = length * token_stride + c.gap(), row = 2 * half + c.note("angle_gap", c.gap());
    const int64_t angles = shared ? 0 : length * row;
    const auto random = [&](int64_t n, Type of) {
        Buffer x(n * size_of(of), c.shift(), 0);
        for (int64_t i = 0; i < n; ++i) put(x.data, i, of, c.random.normal());
        return x;
    };
    const int64_t tokens = samples * length, last = (samples - 1) * sample_stride + (length - 1) * token_stride;
    const Buffer x = random(last + (heads - 1) * head_stride + size, type);
    const int64_t angle_count = (samples - 1) * angles + (length - 1) * row + 2 * half;
    const Buffer cos = random(angle_count, angle), sin = random(angle_count, angle);
    const Buffer y = poisoned(c, tokens * heads * size, type);
    in_ranges<Rotary>(c, c.tier.rows->rotary[wide][index_of(type)],
                      {x.data, sample_stride, token_stride, head_stride, cos.data, sin.data, angles, row, length, heads,
                       size, half, inverse, y.data},
                      tokens);
    for (int64_t i = 0; i < tokens * heads * size; ++i) {
        const int64_t value = i % size, head = i / size % heads, place = i / size / heads % length;
        const int64_t sample = i / size / heads / length;
        const int64_t from = sample * sample_stride + place * token_stride + head * head_stride;
        const int64_t at = sample * angles + place * row;
        if (value >= 2 * half) {
            c.require(get(y.data, i, type) == get(x.data, from + value, type), "what does not turn is not a copy");
            continue;
        }
        // a cos_a ∓ b sin_a, b cos_b ± a sin_b; inverse: the transposed, a cos_a + b sin_b, b cos_b - a sin_a
        const bool first = value < half;
        const int64_t other = first ? value + half : value - half;
        const double straight = double{get(x.data, from + value, type)} * get(cos.data, at + value, angle);
        const float factor = get(sin.data, at + (inverse ? other : value), angle);
        const double across = double{get(x.data, from + other, type)} * factor;
        const double expected = straight + (first == inverse ? across : -across);
        near(c, "y", y, i, type, expected, std::abs(straight) + std::abs(across), 2 * kUnit);
    }
}

// A vocabulary in up to three chunks; the state after each is that of all so far.
void fold_softmax(Case& c) {
    const Type type = c.type();
    const int64_t rows = few_rows(c), chunks = c.note("chunks", 1 + c.random.below(3));
    const float scale = c.note("scale", c.random.of({1.0f, 0.3f}));
    const float cap = c.note("cap", c.random.of({0.0f, 5.0f, 30.0f}));
    const float size = c.note("size", c.random.of({1.0f, 10.0f, 60.0f}));
    const bool gradient = c.note("gradient", !c.random.once_in(3));
    const Buffer state = poisoned_floats(8 * rows);
    float* const part = state.floats();
    for (int64_t i = 0; i < 8 * rows; ++i) part[i] = i < rows ? -3.4028234663852886e38f : i / rows < 5 ? 0 : kNaN;
    const Buffer tops(8 * rows, 0, 0), labels(8 * rows, 0, 0);
    std::vector<int64_t> widths;
    for (int64_t i = 0, all = 0; i < chunks; ++i) {
        widths.push_back(any_width(c));
        all += widths.back();
        if (i + 1 == chunks) {
            for (int64_t row = 0; row < rows; ++row) store(labels.data, row, c.random.below(all));
        }
    }
    std::vector<std::vector<float>> seen(static_cast<size_t>(rows));  // the logits
    int64_t first = 0;
    for (const int64_t width : widths) {
        Buffer logits = poisoned(c, rows * width, type);
        for (int64_t i = 0; i < rows * width; ++i) {
            put(logits.data, i, type, c.random.normal() * size);
            seen[static_cast<size_t>(i / width)].push_back(get(logits.data, i, type));
        }
        const std::vector<float> before(part, part + rows);
        const Buffer given = logits;
        in_ranges<FoldSoftmax>(c, c.tier.rows->fold_softmax,
                               {logits.data, type, width, reinterpret_cast<int64_t*>(labels.data), first, scale, cap,
                                gradient, part, part + rows, part + 2 * rows, part + 3 * rows, part + 4 * rows,
                                part + 5 * rows, part + 6 * rows, part + 7 * rows,
                                reinterpret_cast<int64_t*>(tops.data)},
                               rows);
        if (!gradient) c.same(logits, given, "bytes of logits");
        for (int64_t row = 0; row < rows; ++row) {
            const std::vector<float>& all = seen[static_cast<size_t>(row)];
            const auto z = [&](double x) { return cap > 0 ? cap * std::tanh(x * scale / cap) : x * scale; };
            const auto slope = [&](float x) {
                const double t = cap > 0 ? z(x) / cap : 0;
                return scale * (1 - t * t);
            };
            double maximum = -kInfinity, least = kInfinity;
            for (const float x : all) {
                maximum = std::max(maximum, z(x));
                least = std::min(least, z(x));
            }
            // what z, and so exp(z - maximum), is off, and what sums are
            const double off = 1e-6 * (1 + std::max(std::abs(maximum), std::abs(least)));
            const double sums = off + static_cast<double>(all.size() + 8) * kUnit;
            double sum = 0, weighted = 0, squares = 0, total = 0, size_of_total = 0;
            for (const float x : all) {
                const double below = z(x) - maximum, e = std::exp(below);
                sum += e;
                weighted += e * below;
                squares += e * e;
                total += z(x);
                size_of_total += std::abs(z(x));
            }
            near(c, "maximum", row, part[row], maximum, off);
            near(c, "sum", row, part[rows + row], sum, sums * sum);
            near(c, "weighted", row, part[2 * rows + row], weighted, sums * (sum - weighted));
            near(c, "squares", row, part[3 * rows + row], squares, 2 * sums * squares);
            near(c, "total", row, part[4 * rows + row], total, sums * size_of_total);
            const double old = before[static_cast<size_t>(row)];
            near(c, "shrink", row, part[7 * rows + row], std::exp(old - std::max(old, maximum)), 3 * off);
            const int64_t label = load<int64_t>(labels.data, row), top = load<int64_t>(tops.data, row);
            if (label < static_cast<int64_t>(all.size())) {
                const float x = all[static_cast<size_t>(label)];
                near(c, "label", row, part[5 * rows + row], z(x), off);
                near(c, "slope", row, part[6 * rows + row], slope(x), 4e-6 * scale);
            } else {
                c.require(part[5 * rows + row] != part[5 * rows + row], "a label that was not seen has a logit");
            }
            const bool inside = top >= 0 && top < static_cast<int64_t>(all.size());
            c.require(inside && z(all[static_cast<size_t>(top)]) >= maximum - off, "top is not the largest logit");
            const auto less = [&](float a, float b) { return a * scale < b * scale; };
            const auto best = std::max_element(all.begin(), all.end(), less) - all.begin();
            c.require(cap > 0 || top == best, "top is not the first of the largest logits");
            for (int64_t i = 0; gradient && i < width; ++i) {
                const float x = all[static_cast<size_t>(first + i)];
                const double e = first + i == label ? 0 : std::exp(z(x) - maximum);
                const double bound = e * (3 * off * slope(x) + 4e-6 * scale);
                near(c, "logits", logits, row * width + i, type, e * slope(x), bound, 1);
            }
        }
        first += width;
    }
}

}  // namespace halfbyte

// AdamW: the bytes of the tier `scalar`; and of parameters, that they are near the formula's in double.

#include "adamw.h"
#include "case.h"
#include "tables.h"

namespace halfbyte {
namespace {

Adamw constants(Case& c) {
    const double beta1 = c.note("beta1", c.random.of({0.9, 0.5, 0.2, 0.0})), beta2 = c.random.of({0.999, 0.95, 0.0});
    const int step = static_cast<int>(c.note("step", c.random.of({1, 2, 1000})));
    const double values[] = {1 - 1e-2 * 0.1, beta1,
                             1 - beta1,      beta2,
                             1 - beta2,      std::sqrt(1 - std::pow(beta2, step)),
                             1e-8,           -1e-2 / (1 - std::pow(beta1, step))};
    float rounded[8];
    for (int i = 0; i < 8; ++i) rounded[i] = static_cast<float>(values[i]);
    return {rounded[0], rounded[1], rounded[2], rounded[3], rounded[4], rounded[5], rounded[6], rounded[7]};
}

// A tensor that is stepped, alike for two tiers when copied.
struct Tensor {
    int64_t n;
    Type type;
    Buffer param, grad, m, v, m_absmax, v_absmax;  // moments: fp32, or codes and the scales of their blocks

    Tensor(Case& c, int64_t blocksize)
        : n(c.length()),
          type(c.type()),
          param(c.values(n, type, false)),
          grad(c.values(n, type)),
          m(blocksize ? c.bytes(n, c.shift()) : c.floats(n, 0, -1, 1)),
          v(blocksize ? c.bytes(n, c.shift()) : c.floats(n, 0, 0, 1)),
          m_absmax(c.floats(blocksize ? (n + blocksize - 1) / blocksize : 0, 0, 0, 1)),
          v_absmax(c.floats(m_absmax.size / 4, 0, 0, 1)) {}

    Stepped32bit over_32bit() const { return {param.data, grad.data, m.floats(), v.floats(), n, type}; }
    Stepped8bit over_8bit() const {
        return {param.data, grad.data, {m.data, m_absmax.floats()}, {v.data, v_absmax.floats()}, n, type};
    }
};

// The tensors after a step, against those of the tier `scalar`, and their parameters against the formula in double.
// `moments` gives m and v of a value before the step.
template <class Moments>
void stepped(Case& c, const Adamw& a, const std::vector<Tensor>& before, const std::vector<Tensor>& ours,
             const std::vector<Tensor>& theirs, bool fp32, const Moments& moments) {
    for (size_t t = 0; t < ours.size(); ++t) {
        const Tensor &got = ours[t], &expected = theirs[t], &old = before[t];
        c.same(got.param, expected.param, got.type, "param");
        if (fp32) {
            c.same(got.m, expected.m, Type::fp32, "m");
            c.same(got.v, expected.v, Type::fp32, "v");
        } else {
            c.same(got.m, expected.m, "codes of m");
            c.same(got.v, expected.v, "codes of v");
            c.same(got.m_absmax, expected.m_absmax, Type::fp32, "absmax of m");
            c.same(got.v_absmax, expected.v_absmax, Type::fp32, "absmax of v");
        }
        for (int64_t i = 0; i < got.n; ++i) {
            const double g = get(old.grad.data, i, old.type), p = get(old.param.data, i, old.type);
            if (!(std::abs(g) < 1e15 && std::abs(g) > 1e-15)) continue;
            const auto [m, v] = moments(old, i);
            const double kept = double{a.beta1} * m, new_v = double{a.beta2} * v + double{a.rest2} * g * g;
            if (!(v >= 0 && new_v > 0 && std::isfinite(p))) continue;
            const double factor = a.rate / (std::sqrt(new_v) / a.correction + a.eps);
            const double value = a.decay * p + factor * (kept + a.rest1 * g);
            const double inexact = std::abs(a.decay * p) + std::abs(factor) * (std::abs(kept) + std::abs(g));
            const double difference = std::abs(get(got.param.data, i, got.type) - value);
            const bool right = difference <= 1.01 * rounding(value, got.type) + 1e-6 * inexact;
            c.require(right, c.differ("param", i, get(got.param.data, i, got.type), value));
        }
    }
}

std::vector<Tensor> tensors(Case& c, int64_t blocksize) {
    std::vector<Tensor> tensors;
    for (int64_t i = c.note("tensors", 1 + c.random.below(4)); i > 0; --i) tensors.emplace_back(c, blocksize);
    return tensors;
}

// Gradients next to where the code of m changes, beside a 1 that makes their scale 1.
void put_near_midpoints(Case& c, const Table8bit& table, int64_t blocksize, const Tensor& t) {
    for (int64_t i = 0; i < t.n; ++i) {
        const int64_t k = c.random.below(255);
        const float middle = (table.value[k] + table.value[k + 1]) / 2;
        const float near = c.random.of({middle, std::nextafter(middle, 2.0f), std::nextafter(middle, -2.0f)});
        put(t.grad.data, i, t.type, i % blocksize ? near : 1.0f);
    }
}

}  // namespace

void adamw_32bit(Case& c) {
    const Adamw a = constants(c);
    const std::vector<Tensor> before = tensors(c, 0), ours = before, theirs = before;
    const auto step = [&](const AdamwKernels& kernels, const std::vector<Tensor>& tensors, int threads) {
        std::vector<Stepped32bit> stepped;
        for (const Tensor& t : tensors) stepped.push_back(t.over_32bit());
        adamw_32bit(kernels, a, stepped, threads);
    };
    step(*c.tier.adamw, ours, c.note("threads", 1 + static_cast<int>(c.random.below(3))));
    step(scalar_adamw, theirs, 1);
    stepped(c, a, before, ours, theirs, true,
            [](const Tensor& t, int64_t i) { return std::pair<double, double>(t.m.floats()[i], t.v.floats()[i]); });
}

void adamw_8bit(Case& c) {
    Adamw a = constants(c);
    const int64_t blocksize = c.blocksize();
    const auto m = std::make_unique<Table8bit>(table8bit(table_of(c, 256).data()));
    const auto v = std::make_unique<Table8bit>(table8bit(table_of(c, 256).data()));
    const std::vector<Tensor> before = tensors(c, blocksize);
    if (c.note("near_midpoints", c.random.once_in(3))) {
        a.beta1 = 0;  // m is the gradient
        a.rest1 = 1;
        for (const Tensor& t : before) put_near_midpoints(c, *m, blocksize, t);
    }
    const std::vector<Tensor> ours = before, theirs = before;
    const auto step = [&](const AdamwKernels& kernels, const std::vector<Tensor>& tensors, int threads) {
        std::vector<Stepped8bit> stepped;
        for (const Tensor& t : tensors) stepped.push_back(t.over_8bit());
        adamw_8bit(kernels, a, {*m, *v, blocksize}, stepped, threads);
    };
    step(*c.tier.adamw, ours, c.note("threads", 1 + static_cast<int>(c.random.below(3))));
    step(scalar_adamw, theirs, 1);
    stepped(c, a, before, ours, theirs, false, [&](const Tensor& t, int64_t i) {
        const double old_m = m->value[t.m.data[i]] * t.m_absmax.floats()[i / blocksize];
        return std::pair<double, double>(old_m, v->value[t.v.data[i]] * t.v_absmax.floats()[i / blocksize]);
    });
}

}  // namespace halfbyte

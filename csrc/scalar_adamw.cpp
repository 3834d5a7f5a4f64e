// The baseline tier's AdamW: plain C++ for any processor, any block size and the short last block.

#include <algorithm>
#include <cmath>

#include "adamw.h"
#include "scalar.h"

namespace halfbyte {
namespace {

float denominator(const Adamw& a, float v) { return std::sqrt(v) / a.correction + a.eps; }

template <class T>
void step_32bit(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        const float g = T::load(t.grad, i);
        // Towards the nearer end, so that m is exactly g where beta1 is 0.
        const float m = a.rest1 < 0.5f ? std::fma(a.rest1, g - t.m[i], t.m[i]) : std::fma(a.rest1 - 1, g - t.m[i], g);
        const float v = std::fma(a.rest2 * g, g, a.beta2 * t.v[i]);
        t.m[i] = m;
        t.v[i] = v;
        store(t.param, i, T::round(a.decay * T::load(t.param, i) + a.rate * m / denominator(a, v)));
    }
}

struct Moments {
    float m, v;
    bool finite;  // whether the gradient's square is; otherwise both are zero and the parameter stays
};

// One block of both moments before the step, and what the gradients make of them.
template <class T>
struct Block {
    const Adamw& a;
    const Tables8bit& tables;
    const Stepped8bit& t;
    float scale_m, scale_v;

    Moments at(int64_t i) const {
        const float g = T::load(t.grad, i), square = g * g;
        if (!(square <= kLargest)) return {0.0f, 0.0f, false};
        const float m = tables.m.value[t.m.codes[i]] * scale_m, v = tables.v.value[t.v.codes[i]] * scale_v;
        return {a.beta1 * m + a.rest1 * g, a.beta2 * v + a.rest2 * square, true};
    }
};

uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }  // in the order of magnitudes, NaN on top

// How a block's values become codes: quantize in scalar.cpp.
struct Quantizer {
    const Search8& search;
    bool whole;
    float absmax, divisor, reciprocal;

    Quantizer(const Search8& search, uint32_t largest, bool whole)
        : search(search),
          whole(whole),
          absmax(float_of(largest)),
          divisor(absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax),
          reciprocal(1.0f / divisor) {}

    float statistic() const { return whole ? absmax : divisor; }
    uint8_t code(float value) const {
        const float scaled = whole ? value * reciprocal : value / divisor;
        return static_cast<uint8_t>(nearest(search, clamp(scaled)));
    }
};

template <class T>
void step_8bit(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * tables.blocksize, end = std::min(begin + tables.blocksize, t.n);
        const Block<T> old{a, tables, t, t.m.absmax[block], t.v.absmax[block]};
        uint32_t largest_m = 0, largest_v = 0;
        for (int64_t i = begin; i < end; ++i) {
            const Moments now = old.at(i);
            largest_m = std::max(largest_m, magnitude(now.m));
            largest_v = std::max(largest_v, magnitude(now.v));
            if (!now.finite) continue;
            const float update = a.rate * now.m / denominator(a, now.v);
            store(t.param, i, T::round(a.decay * T::load(t.param, i) + update));
        }
        const bool whole = end - begin == tables.blocksize;
        const Quantizer m(tables.m.search, largest_m, whole), v(tables.v.search, largest_v, whole);
        t.m.absmax[block] = m.statistic();
        t.v.absmax[block] = v.statistic();
        for (int64_t i = begin; i < end; ++i) {
            const Moments now = old.at(i);
            t.m.codes[i] = m.code(now.m);
            t.v.codes[i] = v.code(now.v);
        }
    }
}

void step_32bit_any(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    switch (t.type) {
        case Type::fp32: return step_32bit<Fp32>(a, t, first, last);
        case Type::bf16: return step_32bit<Bf16>(a, t, first, last);
        case Type::fp16: return step_32bit<Fp16>(a, t, first, last);
    }
}

void step_8bit_any(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    switch (t.type) {
        case Type::fp32: return step_8bit<Fp32>(a, tables, t, first, last);
        case Type::bf16: return step_8bit<Bf16>(a, tables, t, first, last);
        case Type::fp16: return step_8bit<Fp16>(a, tables, t, first, last);
    }
}

}  // namespace

const AdamwKernels scalar_adamw = {step_32bit_any, step_8bit_any};

}  // namespace halfbyte

// The NEON tier's AdamW: four values at a time, as avx2_adamw.cpp takes eight.

#if defined(__aarch64__)

#include "adamw.h"
#include "neon.h"

namespace halfbyte {
namespace {

float32x4_t step(const Adamw& a, float32x4_t p, float32x4_t m, float32x4_t v) {
    const float32x4_t root = vdivq_f32(vsqrtq_f32(v), vdupq_n_f32(a.correction));
    const float32x4_t denominator = vaddq_f32(root, vdupq_n_f32(a.eps));
    return vaddq_f32(vmulq_n_f32(p, a.decay), vdivq_f32(vmulq_n_f32(m, a.rate), denominator));
}

template <class T>
void step_32bit(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    const bool from_old = a.rest1 < 0.5f;
    const float weight = from_old ? a.rest1 : a.rest1 - 1;
    const int64_t whole = last - (last - first) % 4;
    for (int64_t i = first; i < whole; i += 4) {
        const float32x4_t g = T::load(t.grad, i), old = load4(t.m + i);
        const float32x4_t m = vfmaq_n_f32(from_old ? old : g, vsubq_f32(g, old), weight);
        const float32x4_t v = vfmaq_f32(vmulq_n_f32(load4(t.v + i), a.beta2), vmulq_n_f32(g, a.rest2), g);
        store4(t.m + i, m);
        store4(t.v + i, v);
        T::store(t.param, i, step(a, T::load(t.param, i), m, v));
    }
    scalar_adamw.step_32bit(a, t, whole, last);
}

// The codes of a block of n values, whose statistic is the largest of these magnitudes (as bits, NaN on top).
void quantize(const Table8bit& table, float* x, int64_t n, uint32x4_t most, uint8_t* codes, float* statistic) {
    const uint32_t largest = vmaxvq_u32(most);
    const float absmax = load<float>(&largest, 0);
    *statistic = absmax;
    const float reciprocal = 1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax);

    const Lines& lines = table.lines;
    // below zero a one-sided table has nothing to tell
    const uint32x4_t sign = vdupq_n_u32(lines.zero ? 0x80000000 : 0);
    const float32x4_t round = vdupq_n_f32(kRound), rank_of_zero = vdupq_n_f32(kRound + lines.zero);
    const uint32x4_t lane_bits = {1, 2, 4, 8};
    for (int64_t i = 0; i < n; i += 16) {
        float32x4_t scaled[4], size[4], least[4];
        for (int k = 0; k < 4; ++k) {
            scaled[k] = vmulq_n_f32(load4(x + i + 4 * k), reciprocal);
            const uint32x4_t unsigned_bits = vbicq_u32(vreinterpretq_u32_f32(scaled[k]), sign);
            size[k] = vmaxq_f32(vdupq_n_f32(kTiny), vreinterpretq_f32_u32(unsigned_bits));  // NaN stays
            least[k] = vdupq_n_f32(lines.intercept[lines.count - 1]);
        }
        for (int line = 0; line < lines.count - 1; ++line) {
            const float32x4_t start = vdupq_n_f32(lines.intercept[line]);
            for (int k = 0; k < 4; ++k) least[k] = vminq_f32(least[k], vfmaq_n_f32(start, size[k], lines.slope[line]));
        }
        uint32_t doubtful = 0;
        uint16x4_t rank[4];
        for (int k = 0; k < 4; ++k) {
            const float32x4_t count = vsubq_f32(vaddq_f32(least[k], round), round);
            const uint32x4_t sure = vcltq_f32(vabdq_f32(least[k], count), vdupq_n_f32(0.5f - kDoubt));
            doubtful |= vaddvq_u32(vbicq_u32(lane_bits, sure)) << 4 * k;
            const uint32x4_t signed_count =
                vorrq_u32(vreinterpretq_u32_f32(count), vandq_u32(sign, vreinterpretq_u32_f32(scaled[k])));
            const uint32x4_t top = vcgtq_f32(scaled[k], vdupq_n_f32(lines.last));  // -1 where it holds
            const float32x4_t bits = vaddq_f32(rank_of_zero, vreinterpretq_f32_u32(signed_count));
            rank[k] = vmovn_u32(vsubq_u32(vreinterpretq_u32_f32(bits), top));
        }
        vst1_u8(codes + i, vmovn_u16(vcombine_u16(rank[0], rank[1])));
        vst1_u8(codes + i + 8, vmovn_u16(vcombine_u16(rank[2], rank[3])));
        if (doubtful) {
            for (int k = 0; k < 4; ++k) store4(x + i + 4 * k, scaled[k]);
            search(table.search, x + i, doubtful, codes + i);
        }
    }
}

template <class T>
void step_8bit(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    float ms[kMostInBlock], vs[kMostInBlock];
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * tables.blocksize;
        for (int64_t i = 0; i < tables.blocksize; ++i) {
            ms[i] = tables.m.value[t.m.codes[begin + i]];
            vs[i] = tables.v.value[t.v.codes[begin + i]];
        }
        const float scale_m = t.m.absmax[block], scale_v = t.v.absmax[block];
        uint32x4_t most_m = vdupq_n_u32(0), most_v = most_m;
        for (int64_t i = 0; i < tables.blocksize; i += 4) {
            const float32x4_t p = T::load(t.param, begin + i), g = T::load(t.grad, begin + i);
            const float32x4_t square = vmulq_f32(g, g);
            const uint32x4_t finite = vcleq_f32(square, vdupq_n_f32(kLargest));
            const float32x4_t old_m = vmulq_n_f32(vmulq_n_f32(load4(ms + i), scale_m), a.beta1);
            const float32x4_t old_v = vmulq_n_f32(vmulq_n_f32(load4(vs + i), scale_v), a.beta2);
            const float32x4_t new_m = vaddq_f32(old_m, vmulq_n_f32(g, a.rest1));
            const float32x4_t new_v = vaddq_f32(old_v, vmulq_n_f32(square, a.rest2));
            const float32x4_t m = vreinterpretq_f32_u32(vandq_u32(finite, vreinterpretq_u32_f32(new_m)));
            const float32x4_t v = vreinterpretq_f32_u32(vandq_u32(finite, vreinterpretq_u32_f32(new_v)));
            store4(ms + i, m);
            store4(vs + i, v);
            most_m = vmaxq_u32(most_m, magnitudes(m));
            most_v = vmaxq_u32(most_v, magnitudes(v));
            T::store(t.param, begin + i, vbslq_f32(finite, step(a, p, m, v), p));
        }
        quantize(tables.m, ms, tables.blocksize, most_m, t.m.codes + begin, t.m.absmax + block);
        quantize(tables.v, vs, tables.blocksize, most_v, t.v.codes + begin, t.v.absmax + block);
    }
}

#include "adamw.inl"

}  // namespace

const AdamwKernels neon_adamw = {step_32bit_any, step_8bit_any};

}  // namespace halfbyte

#endif

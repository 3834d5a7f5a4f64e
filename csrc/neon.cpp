// The NEON tier (64-bit Arm): four values at a time, and tables of sixteen bytes.
//
// A rank is the number of midpoints below a value, which for a table of sixteen is counted one by one; in an 8-bit tree
// so many lead down the first four levels, and the others are walked value by value, there being no gathers.
// Dequantizing 4 bits: the sixteen values of a block are looked up byte by byte and stored interleaved. Block sizes
// that are not a multiple of 32, and a short last block, go to `scalar`.

#if defined(__aarch64__)

#include "adamw.h"
#include "attention.h"
#include "matmul.h"
#include "neon.h"
#include "rows.h"

namespace halfbyte {
namespace {

// The number of the fifteen midpoints of a tree's first four levels that are not at least `value`: fifteen for NaN.
uint32x4_t count_below(const float* midpoint, float32x4_t value) {
    uint32x4_t count = vdupq_n_u32(15);
    // -1 where it is
    for (int i = 1; i < 16; ++i) count = vaddq_u32(count, vcgeq_f32(vdupq_n_f32(midpoint[i]), value));
    return count;
}

struct Searcher4 {
    const Search4& search;
    uint8x16_t code;

    explicit Searcher4(const Search4& search) : search(search), code(vld1q_u8(search.code)) {}

    void quantize(const float32x4_t* values, uint8_t* codes, int64_t i) const {
        uint16x4_t rank[4];
        for (int k = 0; k < 4; ++k) rank[k] = vmovn_u32(count_below(search.midpoint, values[k]));
        const uint8x8_t low = vmovn_u16(vcombine_u16(rank[0], rank[1]));
        const uint8x8_t high = vmovn_u16(vcombine_u16(rank[2], rank[3]));
        const uint8x16_t found = vqtbl1q_u8(code, vcombine_u8(low, high));
        const uint8x16_t even = vuzp1q_u8(found, found), odd = vuzp2q_u8(found, found);
        vst1_u8(codes + i / 2, vget_low_u8(vorrq_u8(vshlq_n_u8(even, 4), odd)));
    }
};

struct Searcher8 {
    const Search8& search;

    explicit Searcher8(const Search8& search) : search(search) {}

    void quantize(const float32x4_t* values, uint8_t* codes, int64_t i) const {
        float value[16];
        uint32_t node[16];
        for (int k = 0; k < 4; ++k) {
            store4(value + 4 * k, values[k]);
            vst1q_u32(node + 4 * k, vaddq_u32(count_below(search.midpoint, values[k]), vdupq_n_u32(16)));
        }
        for (int step = 4; step < 8; ++step) {
            for (int k = 0; k < 16; ++k) node[k] = 2 * node[k] + !(search.midpoint[node[k]] >= value[k]);
        }
        const auto last = static_cast<uint32_t>(search.last);
        for (int k = 0; k < 16; ++k) codes[i + k] = static_cast<uint8_t>(node[k] - 256 < last ? node[k] - 256 : last);
    }
};

// The largest magnitude of a block: magnitudes are ordered as their bits are, NaN on top.
template <class T>
float largest_magnitude(const void* x, int64_t begin, int64_t end) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int64_t i = begin; i < end; i += 4) largest = vmaxq_u32(largest, magnitudes(T::load(x, i)));
    const uint32_t bits = vmaxvq_u32(largest);
    return load<float>(&bits, 0);
}

// Scaled and clamped to [-1, 1]; NaN stays.
float32x4_t scale(float32x4_t value, float reciprocal) {
    return vmaxq_f32(vdupq_n_f32(-1.0f), vminq_f32(vdupq_n_f32(1.0f), vmulq_n_f32(value, reciprocal)));
}

template <class T, class Searcher, class Arguments>
void quantize(const Arguments& a, int64_t first, int64_t last) {
    const Searcher searcher(a.search);
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * a.blocksize, end = begin + a.blocksize;
        const float absmax = largest_magnitude<T>(a.x, begin, end);
        a.absmax[block] = absmax;
        const float reciprocal = 1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax);
        for (int64_t i = begin; i < end; i += 16) {
            float32x4_t values[4];
            for (int k = 0; k < 4; ++k) values[k] = scale(T::load(a.x, i + 4 * k), reciprocal);
            searcher.quantize(values, a.codes, i);
        }
    }
}

template <class T>
void dequantize(const Dequantize4bit& a, int64_t first, int64_t last) {
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; block < last; ++block) {
        const Table<T> table(a.code, scales.next());
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 16) table.store(a.out, i, unpack(a.codes + i / 2));
    }
}

template <class T>
void dequantize(const Dequantize8bit& a, int64_t first, int64_t last) {
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; a.integers && block < last; ++block) {
        const float scale = scales.next();
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 8) {
            const int16x8_t values = vmovl_s8(vreinterpret_s8_u8(vld1_u8(a.codes + i)));
            T::store(a.out, i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(values))), scale));
            T::store(a.out, i + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(values))), scale));
        }
    }
    if (a.integers) return;
    for (int64_t block = first; block < last; ++block) {
        const float scale = scales.next();
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 4) {
            const uint8_t* const codes = a.codes + i;
            const float values[4] = {a.code[codes[0]], a.code[codes[1]], a.code[codes[2]], a.code[codes[3]]};
            T::store(a.out, i, vmulq_n_f32(load4(values), scale));
        }
    }
}

#include "blocks.inl"

bool supported() { return true; }

}  // namespace

const Tier neon = {
    "neon",          supported,   quantize_4bit, quantize_8bit, dequantize_4bit,
    dequantize_8bit, neon_matmul, &neon_adamw,   &neon_rows,    neon_attention,
};

}  // namespace halfbyte

#endif

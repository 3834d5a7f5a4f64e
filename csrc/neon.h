// What NEON files share: the storage types, four values at a time from and to fp32, and a block's values looked up.
//
// NEON is part of every 64-bit Arm processor, so that no function needs a target of its own.

#pragma once

#include <arm_neon.h>

#include "contract.h"

namespace halfbyte {
namespace {

inline const uint8_t* at(const void* base, int64_t byte) { return static_cast<const uint8_t*>(base) + byte; }
inline uint8_t* at(void* base, int64_t byte) { return static_cast<uint8_t*>(base) + byte; }

inline float32x4_t load4(const float* x) { return vreinterpretq_f32_u8(vld1q_u8(at(x, 0))); }
inline void store4(float* out, float32x4_t value) { vst1q_u8(at(out, 0), vreinterpretq_u8_f32(value)); }
inline uint32x4_t magnitudes(float32x4_t x) { return vreinterpretq_u32_f32(vabsq_f32(x)); }  // their order is the bits'

// `widen` makes fp32 of four values that lie in a register, `nearest` gives the nearest value that the type has.
struct Fp32 {
    static constexpr int kSize = 4;
    static float32x4_t load(const void* x, int64_t i) { return vreinterpretq_f32_u8(vld1q_u8(at(x, 4 * i))); }
    static float32x4_t nearest(float32x4_t value) { return value; }
    static void store(void* out, int64_t i, float32x4_t value) {
        vst1q_u8(at(out, 4 * i), vreinterpretq_u8_f32(value));
    }
};

struct Bf16 {
    static constexpr int kSize = 2;
    static float32x4_t widen(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
    static float32x4_t load(const void* x, int64_t i) { return widen(vreinterpret_u16_u8(vld1_u8(at(x, 2 * i)))); }
    static uint16x4_t round(float32x4_t value) {
        const uint32x4_t bits = vreinterpretq_u32_f32(value);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t above = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), above, vdupq_n_u32(0x7fc00000)), 16);
    }
    static float32x4_t nearest(float32x4_t value) { return widen(round(value)); }
    static void store(void* out, int64_t i, float32x4_t value) {
        vst1_u8(at(out, 2 * i), vreinterpret_u8_u16(round(value)));
    }
};

struct Fp16 {
    static constexpr int kSize = 2;
    static float32x4_t widen(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
    static float32x4_t load(const void* x, int64_t i) { return widen(vreinterpret_u16_u8(vld1_u8(at(x, 2 * i)))); }
    static uint16x4_t round(float32x4_t value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }
    static float32x4_t nearest(float32x4_t value) { return widen(round(value)); }
    static void store(void* out, int64_t i, float32x4_t value) {
        vst1_u8(at(out, 2 * i), vreinterpret_u8_u16(round(value)));
    }
};

// What is only read.
struct Int8 {
    static constexpr int kSize = 1;
    static float32x4_t load(const void* x, int64_t i) {
        int32_t four;
        std::memcpy(&four, at(x, i), sizeof four);
        const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
    }
};

// Sixteen 4-bit codes from eight bytes, one to a byte.
inline uint8x16_t unpack(const uint8_t* packed) {
    const uint8x8_t bytes = vld1_u8(packed);
    const uint8x8_t even = vshr_n_u8(bytes, 4), odd = vand_u8(bytes, vdup_n_u8(15));
    return vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
}

// The sixteen values of a block, scaled and rounded to the type T, as tables of their first bytes, second bytes, ...
template <class T>
struct Table {
    uint8x16_t bytes[T::kSize];

    Table(const float* code, float scale) {
        uint8_t values[16 * T::kSize];
        for (int i = 0; i < 16; i += 4) T::store(values, i, vmulq_n_f32(load4(code + i), scale));
        if constexpr (T::kSize == 4) {
            const uint8x16x4_t apart = vld4q_u8(values);
            for (int k = 0; k < 4; ++k) bytes[k] = apart.val[k];
        } else {
            const uint8x16x2_t apart = vld2q_u8(values);
            for (int k = 0; k < 2; ++k) bytes[k] = apart.val[k];
        }
    }

    // The values of sixteen codes as they are stored.
    void store(void* out, int64_t i, uint8x16_t codes) const {
        if constexpr (T::kSize == 4) {
            const uint8x16x4_t values = {{vqtbl1q_u8(bytes[0], codes), vqtbl1q_u8(bytes[1], codes),
                                          vqtbl1q_u8(bytes[2], codes), vqtbl1q_u8(bytes[3], codes)}};
            vst4q_u8(at(out, 4 * i), values);
        } else {
            const uint8x16x2_t values = {{vqtbl1q_u8(bytes[0], codes), vqtbl1q_u8(bytes[1], codes)}};
            vst2q_u8(at(out, 2 * i), values);
        }
    }

    // And in fp32.
    float32x4x4_t look_up(uint8x16_t codes) const {
        uint8x16_t b[T::kSize];
        for (int k = 0; k < T::kSize; ++k) b[k] = vqtbl1q_u8(bytes[k], codes);
        const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b[0], b[1]));
        const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(b[0], b[1]));
        if constexpr (T::kSize == 4) {
            const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(b[2], b[3]));
            const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(b[2], b[3]));
            return {{vreinterpretq_f32_u16(vzip1q_u16(low0, high0)), vreinterpretq_f32_u16(vzip2q_u16(low0, high0)),
                     vreinterpretq_f32_u16(vzip1q_u16(low1, high1)), vreinterpretq_f32_u16(vzip2q_u16(low1, high1))}};
        } else {
            return {{T::widen(vget_low_u16(low0)), T::widen(vget_high_u16(low0)), T::widen(vget_low_u16(low1)),
                     T::widen(vget_high_u16(low1))}};
        }
    }
};

}  // namespace
}  // namespace halfbyte

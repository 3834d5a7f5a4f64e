// The storage types in plain C++: one value at a time, from and to fp32.

#pragma once

#include "contract.h"

namespace halfbyte {
namespace {

inline uint32_t bits_of(float value) { return load<uint32_t>(&value, 0); }
inline float float_of(uint32_t bits) { return load<float>(&bits, 0); }

// `load` element i as fp32, and round fp32 to nearest even. fp32 itself needs neither.
struct Fp32 {
    static constexpr int kSize = 4;
    using Stored = float;
    static float load(const void* x, int64_t i) { return halfbyte::load<float>(x, i); }
    static Stored round(float value) { return value; }
};

struct Bf16 {
    static constexpr int kSize = 2;
    using Stored = uint16_t;
    static float load(const void* x, int64_t i) { return float_of(uint32_t{halfbyte::load<uint16_t>(x, i)} << 16); }
    static Stored round(float value) {
        if (value != value) return 0x7fc0;
        const uint32_t bits = bits_of(value);
        return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Fp16 {
    static constexpr int kSize = 2;
    using Stored = uint16_t;
    static float load(const void* x, int64_t i) {
        const uint32_t half = halfbyte::load<uint16_t>(x, i);
        const uint32_t sign = (half & 0x8000) << 16;
        const uint32_t magnitude = (half & 0x7fff) << 13;
        if (magnitude >= 0x0f800000) return float_of(sign | magnitude | 0x7f800000);  // infinity, NaN
        return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));              // exact, subnormals too
    }
    static Stored round(float value) {
        const uint32_t sign = bits_of(value) >> 16 & 0x8000;
        uint32_t magnitude = bits_of(value) & 0x7fffffff;
        if (magnitude > 0x7f800000) return 0x7e00;
        if (magnitude >= 0x47800000) return static_cast<Stored>(sign | 0x7c00);  // 2^16 and more: infinity
        if (magnitude < 0x38800000) {  // subnormal: the last place of 0.5f is the smallest fp16 value, 2^-24
            magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
            return static_cast<Stored>(sign | magnitude);
        }
        magnitude += 0xfff + (magnitude >> 13 & 1);
        return static_cast<Stored>(sign | (magnitude - 0x38000000) >> 13);
    }
};

// What is only read.
struct Int8 {
    static constexpr int kSize = 1;
    static float load(const void* x, int64_t i) { return static_cast<float>(halfbyte::load<int8_t>(x, i)); }
};

template <class Stored>
void store(void* base, int64_t i, Stored value) {
    std::memcpy(static_cast<char*>(base) + i * static_cast<int64_t>(sizeof(Stored)), &value, sizeof(Stored));
}

}  // namespace
}  // namespace halfbyte

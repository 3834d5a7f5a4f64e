// Four fp32 values: NEON's lanes for the kernels that are written once for every tier (rows.h).

#pragma once

#include "neon.h"

namespace halfbyte {
namespace {

struct Lanes {
    static constexpr int64_t kWidth = 4;
    struct Mask {
        uint32x4_t value;
    };
    float32x4_t value;
    Lanes(float32x4_t value) : value(value) {}
    Lanes(float x = 0.0f) : value(vdupq_n_f32(x)) {}
};

template <class T>
Lanes read(const void* x, int64_t i) {
    return T::load(x, i);
}
template <class T>
void write(void* out, int64_t i, Lanes a) {
    T::store(out, i, a.value);
}
template <class T>
Lanes nearest(Lanes a) {
    return T::nearest(a.value);
}

inline Lanes operator+(Lanes a, Lanes b) { return vaddq_f32(a.value, b.value); }
inline Lanes operator-(Lanes a, Lanes b) { return vsubq_f32(a.value, b.value); }
inline Lanes operator*(Lanes a, Lanes b) { return vmulq_f32(a.value, b.value); }
inline Lanes operator/(Lanes a, Lanes b) { return vdivq_f32(a.value, b.value); }
inline Lanes operator-(Lanes a) { return vnegq_f32(a.value); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c.value, a.value, b.value); }
inline Lanes::Mask operator<(Lanes a, Lanes b) { return {vcltq_f32(a.value, b.value)}; }
inline Lanes select(Lanes::Mask mask, Lanes a, Lanes b) { return vbslq_f32(mask.value, a.value, b.value); }
inline Lanes min(Lanes a, Lanes b) { return select(a < b, a, b); }  // NEON's own would give NaN for either
inline Lanes max(Lanes a, Lanes b) { return select(b < a, a, b); }
inline Lanes abs(Lanes a) { return vabsq_f32(a.value); }
inline Lanes sqrt(Lanes a) { return vsqrtq_f32(a.value); }

inline Lanes scale(Lanes a, Lanes n) {  // in two factors, since 2^n may lie outside fp32
    const int32x4_t whole = vcvtq_s32_f32(n.value), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
    const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
    const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
    return vmulq_f32(vmulq_f32(a.value, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

inline float sum(Lanes a) { return vaddvq_f32(a.value); }
inline float largest(Lanes a) { return vmaxvq_f32(a.value); }

#include "lanes.inl"

}  // namespace
}  // namespace halfbyte

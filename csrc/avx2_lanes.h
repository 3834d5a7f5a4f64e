// Eight fp32 values: AVX2's lanes for the kernels that are written once for every tier (rows.h).
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include "avx2.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace halfbyte {
namespace {

struct Lanes {
    static constexpr int64_t kWidth = 8;
    struct Mask {
        __m256 value;
    };
    __m256 value;
    Lanes(__m256 value) : value(value) {}
    Lanes(float x = 0.0f) : value(_mm256_set1_ps(x)) {}
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

inline Lanes operator+(Lanes a, Lanes b) { return _mm256_add_ps(a.value, b.value); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm256_sub_ps(a.value, b.value); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm256_mul_ps(a.value, b.value); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm256_div_ps(a.value, b.value); }
inline Lanes operator-(Lanes a) { return _mm256_xor_ps(a.value, _mm256_set1_ps(-0.0f)); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a.value, b.value, c.value); }
inline Lanes min(Lanes a, Lanes b) { return _mm256_min_ps(a.value, b.value); }
inline Lanes max(Lanes a, Lanes b) { return _mm256_max_ps(a.value, b.value); }
inline Lanes abs(Lanes a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.value); }
inline Lanes sqrt(Lanes a) { return _mm256_sqrt_ps(a.value); }
inline Lanes::Mask operator<(Lanes a, Lanes b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ)}; }
inline Lanes select(Lanes::Mask mask, Lanes a, Lanes b) { return _mm256_blendv_ps(b.value, a.value, mask.value); }

inline Lanes scale(Lanes a, Lanes n) {  // in two factors, since 2^n may lie outside fp32
    const __m256i whole = _mm256_cvtps_epi32(n.value), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a.value, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

inline float sum(Lanes a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.value), _mm256_extractf128_ps(a.value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest(Lanes a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.value), _mm256_extractf128_ps(a.value, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#include "lanes.inl"

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

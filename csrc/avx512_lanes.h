// Sixteen fp32 values: AVX-512's lanes for the kernels that are written once for every tier (rows.h).
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include "avx512.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace halfbyte {
namespace {

struct Lanes {
    static constexpr int64_t kWidth = 16;
    using Mask = __mmask16;
    __m512 value;
    Lanes(__m512 value) : value(value) {}
    Lanes(float x = 0.0f) : value(_mm512_set1_ps(x)) {}
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

inline Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.value, b.value); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.value, b.value); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.value, b.value); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.value, b.value); }
inline Lanes operator-(Lanes a) { return _mm512_xor_ps(a.value, _mm512_set1_ps(-0.0f)); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.value, b.value, c.value); }
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a.value, b.value); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a.value, b.value); }
inline Lanes abs(Lanes a) { return _mm512_abs_ps(a.value); }
inline Lanes sqrt(Lanes a) { return _mm512_sqrt_ps(a.value); }
inline Lanes::Mask operator<(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ); }
inline Lanes select(Lanes::Mask mask, Lanes a, Lanes b) { return _mm512_mask_mov_ps(b.value, mask, a.value); }
inline Lanes scale(Lanes a, Lanes n) { return _mm512_scalef_ps(a.value, n.value); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.value); }
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.value); }

#include "lanes.inl"

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

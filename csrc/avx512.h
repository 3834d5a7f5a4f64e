// What AVX-512 files share: the storage types, sixteen values at a time from and to fp32, and lookups in registers.
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include <immintrin.h>

#include "contract.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace halfbyte {
namespace {

inline const char* at(const void* base, int64_t i, int size) { return static_cast<const char*>(base) + i * size; }
inline char* at(void* base, int64_t i, int size) { return static_cast<char*>(base) + i * size; }

// The first `count` of sixteen values.
inline __mmask16 first16(int64_t count) { return __mmask16(count < 16 ? (1 << count) - 1 : 0xffff); }

// `nearest` gives the nearest value that the type has, `round` its stored bits; `load` with a mask leaves the others
// zero.
struct Fp32 {
    static constexpr int kSize = 4;
    static __m512 load(const void* x, int64_t i) { return _mm512_loadu_ps(at(x, i, 4)); }
    static __m512 load(const void* x, int64_t i, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at(x, i, 4)); }
    static __m512 nearest(__m512 value) { return value; }
    static void store(void* out, int64_t i, __m512 value) { _mm512_storeu_ps(at(out, i, 4), value); }
};

struct Bf16 {
    static constexpr int kSize = 2;
    static __m512 widen(__m256i half) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static __m512 load(const void* x, int64_t i) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(x, i, 2))));
    }
    static __m512 load(const void* x, int64_t i, __mmask16 mask) {
        return widen(_mm256_maskz_loadu_epi16(mask, at(x, i, 2)));
    }
    static __m512 nearest(__m512 value) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i above = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i rounded = _mm512_and_si512(above, _mm512_set1_epi32(int(0xffff0000)));
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)));
    }
    static __m256i round(__m512 value) {
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(nearest(value)), 16));
    }
    static void store(void* out, int64_t i, __m512 value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(out, i, 2)), round(value));
    }
};

struct Fp16 {
    static constexpr int kSize = 2;
    static __m512 load(const void* x, int64_t i) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(x, i, 2))));
    }
    static __m512 load(const void* x, int64_t i, __mmask16 mask) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at(x, i, 2)));
    }
    static __m256i round(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
    static __m512 nearest(__m512 value) { return _mm512_cvtph_ps(round(value)); }
    static void store(void* out, int64_t i, __m512 value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(out, i, 2)), round(value));
    }
};

// What is only read.
struct Int8 {
    static constexpr int kSize = 1;
    static __m512 load(const void* x, int64_t i) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(x, i, 1)))));
    }
};

// The entries `index` of a table of 32 to 256 values in registers; higher bits are ignored.
inline __m512 pick32(__m512i index, const __m512* table) { return _mm512_permutex2var_ps(table[0], index, table[1]); }

inline __m512 pick64(__m512i index, const __m512* table) {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    return _mm512_mask_mov_ps(pick32(index, table), upper, pick32(index, table + 2));
}

inline __m512 pick128(__m512i index, const __m512* table) {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    return _mm512_mask_mov_ps(pick64(index, table), upper, pick64(index, table + 4));
}

inline __m512 pick256(__m512i index, const __m512* table) {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
    return _mm512_mask_mov_ps(pick128(index, table), upper, pick128(index, table + 8));
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// What AVX2 files share: the storage types, eight values at a time from and to fp32, packing, and lookups.
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include <immintrin.h>

#include "contract.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace halfbyte {
namespace {

inline const __m128i* at(const void* base, int64_t byte) {
    return reinterpret_cast<const __m128i*>(static_cast<const char*>(base) + byte);
}
inline __m128i* at(void* base, int64_t byte) { return reinterpret_cast<__m128i*>(static_cast<char*>(base) + byte); }

// Eight lanes of 32 bits, each below 2^16, as words.
inline __m128i low_words(__m256i a) {
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

// Sixteen lanes of 32 bits, as bytes (of values up to 32767, the low eight bits of which count).
inline __m128i low_bytes(__m256i a, __m256i b) {
    const __m256i mask = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
}

// `nearest` gives the nearest value that the type has, `round` its stored bits.
struct Fp32 {
    static constexpr int kSize = 4;
    static __m256 load(const void* x, int64_t i) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(at(x, 4 * i)));
    }
    static __m256 nearest(__m256 value) { return value; }
    static void store(void* out, int64_t i, __m256 value) {
        _mm256_storeu_ps(reinterpret_cast<float*>(at(out, 4 * i)), value);
    }
};

struct Bf16 {
    static constexpr int kSize = 2;
    static __m256 load(const void* x, int64_t i) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at(x, 2 * i))), 16));
    }
    static __m256 nearest(__m256 value) {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i above = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(above, _mm256_set1_epi32(int(0xffff0000))));
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_blendv_ps(rounded, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    }
    static __m128i round(__m256 value) { return low_words(_mm256_srli_epi32(_mm256_castps_si256(nearest(value)), 16)); }
    static void store(void* out, int64_t i, __m256 value) { _mm_storeu_si128(at(out, 2 * i), round(value)); }
};

struct Fp16 {
    static constexpr int kSize = 2;
    static __m256 load(const void* x, int64_t i) { return _mm256_cvtph_ps(_mm_loadu_si128(at(x, 2 * i))); }
    static __m128i round(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
    static __m256 nearest(__m256 value) { return _mm256_cvtph_ps(round(value)); }
    static void store(void* out, int64_t i, __m256 value) { _mm_storeu_si128(at(out, 2 * i), round(value)); }
};

// What is only read.
struct Int8 {
    static constexpr int kSize = 1;
    static __m256 load(const void* x, int64_t i) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at(x, i))));
    }
};

// The sixteen values of a block, rounded to the type T.
template <class T>
struct Table {
    __m256 low, high;

    Table(const float* code, float scale)
        : low(T::nearest(_mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(scale)))),
          high(T::nearest(_mm256_mul_ps(_mm256_loadu_ps(code + 8), _mm256_set1_ps(scale)))) {}

    // Eight values from four bytes.
    __m256 look_up(const uint8_t* codes) const {
        const __m256i bytes = _mm256_set1_epi32(load<int32_t>(codes, 0));
        const __m256i spread = _mm256_set_epi32(  // a byte to each lane, twice
            int(0x80808003), int(0x80808003), int(0x80808002), int(0x80808002), int(0x80808001), int(0x80808001),
            int(0x80808000), int(0x80808000));
        const __m256i index = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, spread), _mm256_set1_epi64x(4));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign: code 8 and above
        const __m256 value0 = _mm256_permutevar8x32_ps(low, index), value1 = _mm256_permutevar8x32_ps(high, index);
        return _mm256_blendv_ps(value0, value1, upper);
    }
};

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

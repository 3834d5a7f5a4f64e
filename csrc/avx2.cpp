// The AVX2 tier (with FMA and F16C): eight values at a time.
//
// The search trees' upper levels lie in registers and are read by permutes, whose lanes ignore the upper bits of an
// index; the lower levels of an 8-bit tree are gathered. Dequantizing 4 bits: a block has only sixteen different
// values, so they are made once per block, already scaled and rounded, and looked up; 16-bit ones as two tables of
// bytes. Block sizes that are not a multiple of 32, and a short last block, go to `scalar`.

#if defined(__x86_64__)

#include <cpuid.h>

#include "adamw.h"
#include "attention.h"
#include "avx2.h"
#include "matmul.h"
#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace halfbyte {
namespace {

// One step down the tree: node = 2 node + not (midpoint >= value).
__m256i descend(__m256i node, __m256 midpoint, __m256 value) {
    const __m256 right = _mm256_cmp_ps(midpoint, value, _CMP_NGE_UQ);  // -1 where it holds
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), _mm256_castps_si256(right));
}

// The first four steps: nodes 1 to 7 in one register, 8 to 15 in the other.
__m256i descend4(__m256 value, __m256 top, __m256 bottom) {
    __m256i node = _mm256_set1_epi32(1);
    for (int step = 0; step < 3; ++step) node = descend(node, _mm256_permutevar8x32_ps(top, node), value);
    return descend(node, _mm256_permutevar8x32_ps(bottom, node), value);
}

struct Searcher4 {
    __m256 top, bottom;
    __m128i code;

    explicit Searcher4(const Search4& search)
        : top(_mm256_loadu_ps(search.midpoint)),
          bottom(_mm256_loadu_ps(search.midpoint + 8)),
          code(_mm_loadu_si128(at(search.code, 0))) {}

    void quantize(__m256 value0, __m256 value1, uint8_t* codes, int64_t i) const {
        const __m128i node = low_bytes(descend4(value0, top, bottom), descend4(value1, top, bottom));
        const __m128i rank = _mm_and_si128(node, _mm_set1_epi8(15));
        const __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(code, rank), _mm_set1_epi16(0x0110));  // 16 even + odd
        _mm_storel_epi64(at(codes, i / 2), _mm_packus_epi16(pairs, pairs));
    }
};

struct Searcher8 {
    __m256 top, bottom;
    __m256i largest;
    const float* tree;

    explicit Searcher8(const Search8& search)
        : top(_mm256_loadu_ps(search.midpoint)),
          bottom(_mm256_loadu_ps(search.midpoint + 8)),
          largest(_mm256_set1_epi32(256 + search.last)),
          tree(search.midpoint) {}

    __m256i node(__m256 value) const {
        __m256i node = descend4(value, top, bottom);
        for (int step = 4; step < 8; ++step) node = descend(node, _mm256_i32gather_ps(tree, node, 4), value);
        return _mm256_min_epi32(node, largest);
    }

    void quantize(__m256 value0, __m256 value1, uint8_t* codes, int64_t i) const {
        _mm_storeu_si128(at(codes, i), low_bytes(node(value0), node(value1)));
    }
};

// The largest magnitude of a block: magnitudes are ordered as their bits are, NaN on top.
template <class T>
float largest_magnitude(const void* x, int64_t begin, int64_t end) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = begin; i < end; i += 8) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(T::load(x, i)), mask));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
}

// Scaled and clamped to [-1, 1]; min and max return their second operand where either is NaN.
__m256 scale(__m256 value, __m256 reciprocal) {
    const __m256 below = _mm256_min_ps(_mm256_set1_ps(1.0f), _mm256_mul_ps(value, reciprocal));
    return _mm256_max_ps(_mm256_set1_ps(-1.0f), below);
}

template <class T, class Searcher, class Arguments>
void quantize(const Arguments& a, int64_t first, int64_t last) {
    const Searcher searcher(a.search);
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * a.blocksize, end = begin + a.blocksize;
        const float absmax = largest_magnitude<T>(a.x, begin, end);
        a.absmax[block] = absmax;
        const __m256 reciprocal = _mm256_set1_ps(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));
        for (int64_t i = begin; i < end; i += 16) {
            searcher.quantize(scale(T::load(a.x, i), reciprocal), scale(T::load(a.x, i + 8), reciprocal), a.codes, i);
        }
    }
}

// The codes of sixteen bytes, in order: 32 of them, a byte each.
struct Codes32 {
    __m128i first, second;

    explicit Codes32(__m128i bytes) {
        const __m128i mask = _mm_set1_epi8(15);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
        first = _mm_unpacklo_epi8(high, low);
        second = _mm_unpackhi_epi8(high, low);
    }
};

template <class T>
struct Lookup4 {
    __m128i low, high;  // the low and the high bytes of the sixteen values

    Lookup4(__m256 values0, __m256 values1) {
        const __m128i a = T::round(values0), b = T::round(values1), mask = _mm_set1_epi16(255);
        low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
        high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    }

    void store(void* out, int64_t i, __m128i codes) const {
        const __m128i lows = _mm_shuffle_epi8(low, codes), highs = _mm_shuffle_epi8(high, codes);
        _mm_storeu_si128(at(out, 2 * i), _mm_unpacklo_epi8(lows, highs));
        _mm_storeu_si128(at(out, 2 * i + 16), _mm_unpackhi_epi8(lows, highs));
    }
};

template <>
struct Lookup4<Fp32> {
    __m256 low, high;  // the first and the last eight values

    Lookup4(__m256 values0, __m256 values1) : low(values0), high(values1) {}

    void store8(void* out, int64_t i, __m128i codes) const {
        const __m256i index = _mm256_cvtepu8_epi32(codes);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign: code 8 and above
        const __m256 value0 = _mm256_permutevar8x32_ps(low, index), value1 = _mm256_permutevar8x32_ps(high, index);
        Fp32::store(out, i, _mm256_blendv_ps(value0, value1, upper));
    }

    void store(void* out, int64_t i, __m128i codes) const {
        store8(out, i, codes);
        store8(out, i + 8, _mm_srli_si128(codes, 8));
    }
};

template <class T>
void dequantize(const Dequantize4bit& a, int64_t first, int64_t last) {
    const __m256 code0 = _mm256_loadu_ps(a.code), code1 = _mm256_loadu_ps(a.code + 8);
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; block < last; ++block) {
        const __m256 scale = _mm256_set1_ps(scales.next());
        const Lookup4<T> lookup(_mm256_mul_ps(code0, scale), _mm256_mul_ps(code1, scale));
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 32) {
            const Codes32 codes(_mm_loadu_si128(at(a.codes, i / 2)));
            lookup.store(a.out, i, codes.first);
            lookup.store(a.out, i + 16, codes.second);
        }
    }
}

template <class T>
void dequantize(const Dequantize8bit& a, int64_t first, int64_t last) {
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; a.integers && block < last; ++block) {
        const __m256 scale = _mm256_set1_ps(scales.next());
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 8) {
            const __m256i values = _mm256_cvtepi8_epi32(_mm_loadl_epi64(at(a.codes, i)));
            T::store(a.out, i, _mm256_mul_ps(_mm256_cvtepi32_ps(values), scale));
        }
    }
    if (a.integers) return;
    for (int64_t block = first; block < last; ++block) {
        const __m256 scale = _mm256_set1_ps(scales.next());
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 8) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at(a.codes, i)));
            T::store(a.out, i, _mm256_mul_ps(_mm256_i32gather_ps(a.code, index, 4), scale));
        }
    }
}

#include "blocks.inl"

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {
namespace {

bool supported() {
    constexpr unsigned f16c = 1u << 29;  // which clang's built-in does not know
    unsigned eax, ebx, ecx, edx;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           (ecx & f16c);
}

}  // namespace

const Tier avx2 = {
    "avx2",          supported,   quantize_4bit, quantize_8bit, dequantize_4bit,
    dequantize_8bit, avx2_matmul, &avx2_adamw,   &avx2_rows,    avx2_attention,
};

}  // namespace halfbyte

#endif

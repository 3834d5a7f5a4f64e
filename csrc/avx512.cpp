// The AVX-512 tier (F, BW, VL, DQ): sixteen values at a time.
//
// Searching: the midpoint tree's levels lie in registers and are read by permutes, whose lanes ignore the upper bits of
// an index, so that a node's number is its own index into its level. A 4-bit tree is one register, an 8-bit tree
// sixteen. Dequantizing 4 bits: a block has only sixteen different values, so they are made once per block, already
// scaled and rounded, and looked up. Block sizes that are not a multiple of 32, and a short last block, go to `scalar`.

#if defined(__x86_64__)

#include "adamw.h"
#include "attention.h"
#include "avx512.h"
#include "matmul.h"
#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace halfbyte {
namespace {

// One step down the tree: node = 2 node + not (midpoint >= value).
__m512i descend(__m512i node, __m512 midpoint, __m512 value) {
    const __mmask16 right = _mm512_cmp_ps_mask(midpoint, value, _CMP_NGE_UQ);
    const __m512i left = _mm512_add_epi32(node, node);
    return _mm512_mask_add_epi32(left, right, left, _mm512_set1_epi32(1));
}

struct Searcher4 {
    __m512 tree;
    __m128i code;

    explicit Searcher4(const Search4& search)
        : tree(_mm512_loadu_ps(search.midpoint)),
          code(_mm_loadu_si128(reinterpret_cast<const __m128i*>(search.code))) {}

    void quantize(__m512 value, uint8_t* codes, int64_t i) const {
        __m512i node = _mm512_set1_epi32(1);
        for (int step = 0; step < 4; ++step) node = descend(node, _mm512_permutexvar_ps(node, tree), value);
        const __m128i rank = _mm_and_si128(_mm512_cvtepi32_epi8(node), _mm_set1_epi8(15));
        const __m128i pairs = _mm_maddubs_epi16(_mm_shuffle_epi8(code, rank), _mm_set1_epi16(0x0110));  // 16 even + odd
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i / 2), _mm_packus_epi16(pairs, pairs));
    }
};

struct Searcher8 {
    __m512 tree[16];
    __m512i largest;

    explicit Searcher8(const Search8& search) : largest(_mm512_set1_epi32(256 + search.last)) {
        for (int i = 0; i < 16; ++i) tree[i] = _mm512_loadu_ps(search.midpoint + 16 * i);
    }

    void quantize(__m512 value, uint8_t* codes, int64_t i) const {
        __m512i node = _mm512_set1_epi32(1);
        for (int step = 0; step < 4; ++step) node = descend(node, _mm512_permutexvar_ps(node, tree[0]), value);
        node = descend(node, _mm512_permutexvar_ps(node, tree[1]), value);
        node = descend(node, pick32(node, tree + 2), value);
        node = descend(node, pick64(node, tree + 4), value);
        node = descend(node, pick128(node, tree + 8), value);
        node = _mm512_min_epi32(node, largest);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(node));
    }
};

template <class T, class Searcher, class Arguments>
void quantize(const Arguments& a, int64_t first, int64_t last) {
    const Searcher searcher(a.search);
    const __m512 one = _mm512_set1_ps(1.0f), minus_one = _mm512_set1_ps(-1.0f);
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * a.blocksize, end = begin + a.blocksize;
        __m512i largest = _mm512_setzero_si512();  // the order of magnitudes is that of their bits, NaN on top
        for (int64_t i = begin; i < end; i += 16) {
            const __m512i magnitude = _mm512_castps_si512(_mm512_abs_ps(T::load(a.x, i)));
            largest = _mm512_max_epi32(largest, magnitude);
        }
        const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
        a.absmax[block] = absmax;
        const __m512 reciprocal = _mm512_set1_ps(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));
        for (int64_t i = begin; i < end; i += 16) {
            const __m512 scaled = _mm512_mul_ps(T::load(a.x, i), reciprocal);
            // min and max return their second operand where either is NaN
            searcher.quantize(_mm512_max_ps(minus_one, _mm512_min_ps(one, scaled)), a.codes, i);
        }
    }
}

// Thirty-two 16-bit values from sixteen bytes: a lane of 32 bits takes one byte, its first code in the low half.
template <class T>
struct Lookup4 {
    __m512i table;  // the sixteen values, twice

    explicit Lookup4(__m512 values) : table(_mm512_broadcast_i64x4(T::round(values))) {}

    void store(const Dequantize4bit& a, int64_t i) const {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.codes + i / 2));
        const __m512i lanes = _mm512_cvtepu8_epi32(bytes);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(lanes, 4), _mm512_slli_epi32(lanes, 16));
        _mm512_storeu_si512(at(a.out, i, 2), _mm512_permutexvar_epi16(index, table));
    }
};

template <>
struct Lookup4<Fp32> {
    __m512 table;

    explicit Lookup4(__m512 values) : table(values) {}

    void store(const Dequantize4bit& a, int64_t i) const {
        for (int64_t half = i; half < i + 32; half += 16) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a.codes + half / 2));
            const __m512i lanes = _mm512_cvtepu8_epi64(bytes);
            const __m512i index = _mm512_or_si512(_mm512_srli_epi64(lanes, 4), _mm512_slli_epi64(lanes, 32));
            Fp32::store(a.out, half, _mm512_permutexvar_ps(index, table));
        }
    }
};

template <class T>
void dequantize(const Dequantize4bit& a, int64_t first, int64_t last) {
    const __m512 code = _mm512_loadu_ps(a.code);
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; block < last; ++block) {
        const Lookup4<T> lookup(_mm512_mul_ps(code, _mm512_set1_ps(scales.next())));
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 32) lookup.store(a, i);
    }
}

template <class T>
void dequantize(const Dequantize8bit& a, int64_t first, int64_t last) {
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; a.integers && block < last; ++block) {
        const __m512 scale = _mm512_set1_ps(scales.next());
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 16) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.codes + i));
            T::store(a.out, i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale));
        }
    }
    if (a.integers) return;
    __m512 table[16];
    for (int i = 0; i < 16; ++i) table[i] = _mm512_loadu_ps(a.code + 16 * i);
    for (int64_t block = first; block < last; ++block) {
        const __m512 scale = _mm512_set1_ps(scales.next());
        const int64_t begin = block * a.blocksize;
        for (int64_t i = begin; i < begin + a.blocksize; i += 16) {
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a.codes + i)));
            T::store(a.out, i, _mm512_mul_ps(pick256(index, table), scale));
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
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const Tier avx512 = {
    "avx512",        supported,     quantize_4bit, quantize_8bit, dequantize_4bit,
    dequantize_8bit, avx512_matmul, &avx512_adamw, &avx512_rows,  avx512_attention,
};

}  // namespace halfbyte

#endif

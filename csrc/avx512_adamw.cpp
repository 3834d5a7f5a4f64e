// The AVX-512 tier's AdamW: sixteen values at a time.
//
// A block's 8-bit moments go through arrays in the first-level cache, so that one table at a time lies in registers. Of
// a table's lines the three that matter in the value's binade are picked by permutes, whose lanes ignore the upper bits
// of an index. Block sizes that are not a multiple of 32, or large, and a short last block, go to `scalar_adamw`.

#if defined(__x86_64__)

#include "adamw.h"
#include "avx512.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace halfbyte {
namespace {

// The constants of a step, each in every lane.
struct Constants {
    __m512 decay, beta1, rest1, beta2, rest2, correction, eps, rate;

    explicit Constants(const Adamw& a)
        : decay(_mm512_set1_ps(a.decay)),
          beta1(_mm512_set1_ps(a.beta1)),
          rest1(_mm512_set1_ps(a.rest1)),
          beta2(_mm512_set1_ps(a.beta2)),
          rest2(_mm512_set1_ps(a.rest2)),
          correction(_mm512_set1_ps(a.correction)),
          eps(_mm512_set1_ps(a.eps)),
          rate(_mm512_set1_ps(a.rate)) {}

    __m512 step(__m512 p, __m512 m, __m512 v) const {
        const __m512 denominator = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), correction), eps);
        return _mm512_add_ps(_mm512_mul_ps(decay, p), _mm512_div_ps(_mm512_mul_ps(rate, m), denominator));
    }
};

template <class T>
void step_32bit(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    const Constants c(a);
    const bool from_old = a.rest1 < 0.5f;
    const __m512 weight = _mm512_set1_ps(from_old ? a.rest1 : a.rest1 - 1);
    const int64_t whole = last - (last - first) % 16;
    for (int64_t i = first; i < whole; i += 16) {
        const __m512 g = T::load(t.grad, i), old = _mm512_loadu_ps(t.m + i);
        const __m512 m = _mm512_fmadd_ps(weight, _mm512_sub_ps(g, old), from_old ? old : g);
        const __m512 decayed = _mm512_mul_ps(c.beta2, _mm512_loadu_ps(t.v + i));
        const __m512 v = _mm512_fmadd_ps(_mm512_mul_ps(c.rest2, g), g, decayed);
        _mm512_storeu_ps(t.m + i, m);
        _mm512_storeu_ps(t.v + i, v);
        T::store(t.param, i, c.step(T::load(t.param, i), m, v));
    }
    scalar_adamw.step_32bit(a, t, whole, last);
}

// The entries `index` of a table of 256 words. Lookups read six bits of an index; the masks are of its bits 6 and 7.
__m512i pick256_words(__m512i index, __mmask32 bit6, __mmask32 bit7, const __m512i* table) {
    __m512i quarter[4];
    for (int k = 0; k < 4; ++k) quarter[k] = _mm512_permutex2var_epi16(table[2 * k], index, table[2 * k + 1]);
    const __m512i low = _mm512_mask_mov_epi16(quarter[0], bit6, quarter[1]);
    return _mm512_mask_mov_epi16(low, bit7, _mm512_mask_mov_epi16(quarter[2], bit6, quarter[3]));
}

// out = value[codes] * scale, n values. Looked up by halves, since that is 32 at a time.
void expand(const Table8bit& table, const uint8_t* codes, float scale, int64_t n, float* out) {
    __m512i low[8], high[8];
    for (int k = 0; k < 8; ++k) {
        low[k] = _mm512_loadu_si512(table.low + 32 * k);
        high[k] = _mm512_loadu_si512(table.high + 32 * k);
    }
    const __m512 scales = _mm512_set1_ps(scale);
    // Interleaving takes four words of every eight: the codes 0 to 3, 16 to 19, 4 to 7, 20 to 23, ...
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < n; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i index = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
        const __m512i lows = pick256_words(index, bit6, bit7, low), highs = pick256_words(index, bit6, bit7, high);
        const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lows, highs));
        const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lows, highs));
        _mm512_store_ps(out + i, _mm512_mul_ps(first, scales));
        _mm512_store_ps(out + i + 16, _mm512_mul_ps(second, scales));
    }
}

// The codes of a block of n values, whose statistic is the largest of these magnitudes (as bits, NaN on top).
void quantize(const Table8bit& table, float* x, int64_t n, __m512i magnitudes, uint8_t* codes, float* statistic) {
    const int32_t largest = _mm512_reduce_max_epi32(magnitudes);
    const float absmax = load<float>(&largest, 0);
    *statistic = absmax;
    const __m512 reciprocal = _mm512_set1_ps(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));

    const Lines& lines = table.lines;
    const __m512i low = _mm512_loadu_si512(lines.first), high = _mm512_loadu_si512(lines.first + 16);
    __m512 slope[3], intercept[3];
    for (int k = 0; k < 3; ++k) {
        slope[k] = _mm512_loadu_ps(lines.slope + k);
        intercept[k] = _mm512_loadu_ps(lines.intercept + k);
    }
    const __m512 sign = _mm512_set1_ps(lines.zero ? -0.0f : 0.0f);  // below zero a one-sided table has nothing to tell
    const __m512 rank_of_zero = _mm512_set1_ps(kRound + lines.zero), last = _mm512_set1_ps(lines.last);
    for (int64_t i = 0; i < n; i += 32) {
        __m512 scaled[2];
        uint32_t doubtful = 0;
        for (int k = 0; k < 2; ++k) {
            scaled[k] = _mm512_mul_ps(_mm512_load_ps(x + i + 16 * k), reciprocal);
            // max returns its second operand where either is NaN.
            const __m512 size = _mm512_max_ps(_mm512_set1_ps(kTiny), _mm512_andnot_ps(sign, scaled[k]));

            const __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(size), 23);
            const __m512i line = _mm512_permutex2var_epi32(low, binade, high);
            __m512 height[3];
            for (int j = 0; j < 3; ++j) {
                const __m512 start = _mm512_permutexvar_ps(line, intercept[j]);
                height[j] = _mm512_fmadd_ps(_mm512_permutexvar_ps(line, slope[j]), size, start);
            }
            const __m512 least = _mm512_min_ps(_mm512_min_ps(height[0], height[1]), height[2]);
            const __m512 count = _mm512_or_ps(least, _mm512_and_ps(sign, scaled[k]));
            const __m512 rank = _mm512_add_ps(count, rank_of_zero);
            const __m512 off = _mm512_abs_ps(_mm512_sub_ps(count, _mm512_sub_ps(rank, rank_of_zero)));
            const __mmask16 doubt = _mm512_cmp_ps_mask(off, _mm512_set1_ps(0.5f - kDoubt), _CMP_NLT_UQ);
            doubtful |= static_cast<uint32_t>(doubt) << 16 * k;

            const __mmask16 top = _mm512_cmp_ps_mask(scaled[k], last, _CMP_GT_OQ);
            const __m512i bits = _mm512_castps_si512(rank);
            const __m512i code = _mm512_mask_add_epi32(bits, top, bits, _mm512_set1_epi32(1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i + 16 * k), _mm512_cvtepi32_epi8(code));
        }
        if (doubtful) {
            for (int k = 0; k < 2; ++k) _mm512_store_ps(x + i + 16 * k, scaled[k]);
            search(table.search, x + i, doubtful, codes + i);
        }
    }
}

template <class T>
void step_8bit(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    const Constants c(a);
    const __m512 largest = _mm512_set1_ps(kLargest);
    alignas(64) float ms[kMostInBlock], vs[kMostInBlock];
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * tables.blocksize;
        expand(tables.m, t.m.codes + begin, t.m.absmax[block], tables.blocksize, ms);
        expand(tables.v, t.v.codes + begin, t.v.absmax[block], tables.blocksize, vs);
        __m512i most_m = _mm512_setzero_si512(), most_v = most_m;
        for (int64_t i = 0; i < tables.blocksize; i += 16) {
            const __m512 p = T::load(t.param, begin + i), g = T::load(t.grad, begin + i);
            const __m512 square = _mm512_mul_ps(g, g);
            const __mmask16 finite = _mm512_cmp_ps_mask(square, largest, _CMP_LE_OQ);
            const __m512 old_m = _mm512_mul_ps(c.beta1, _mm512_load_ps(ms + i));
            const __m512 old_v = _mm512_mul_ps(c.beta2, _mm512_load_ps(vs + i));
            const __m512 m = _mm512_maskz_add_ps(finite, old_m, _mm512_mul_ps(c.rest1, g));
            const __m512 v = _mm512_maskz_add_ps(finite, old_v, _mm512_mul_ps(c.rest2, square));
            _mm512_store_ps(ms + i, m);
            _mm512_store_ps(vs + i, v);
            most_m = _mm512_max_epi32(most_m, _mm512_castps_si512(_mm512_abs_ps(m)));
            most_v = _mm512_max_epi32(most_v, _mm512_castps_si512(_mm512_abs_ps(v)));
            T::store(t.param, begin + i, _mm512_mask_mov_ps(p, finite, c.step(p, m, v)));
        }
        quantize(tables.m, ms, tables.blocksize, most_m, t.m.codes + begin, t.m.absmax + block);
        quantize(tables.v, vs, tables.blocksize, most_v, t.v.codes + begin, t.v.absmax + block);
    }
}

#include "adamw.inl"

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const AdamwKernels avx512_adamw = {step_32bit_any, step_8bit_any};

}  // namespace halfbyte

#endif

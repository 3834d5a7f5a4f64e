// The AVX2 tier's AdamW: eight values at a time.
//
// A block's 8-bit moments go through arrays in the first-level cache. They are looked up one by one, since gathers are
// no faster; all of a table's lines are evaluated, for 32 values at a time. Block sizes that are not a multiple of 32,
// or large, and a short last block, go to `scalar_adamw`.

#if defined(__x86_64__)

#include "adamw.h"
#include "avx2.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace halfbyte {
namespace {

// The constants of a step, each in every lane.
struct Constants {
    __m256 decay, beta1, rest1, beta2, rest2, correction, eps, rate;

    explicit Constants(const Adamw& a)
        : decay(_mm256_set1_ps(a.decay)),
          beta1(_mm256_set1_ps(a.beta1)),
          rest1(_mm256_set1_ps(a.rest1)),
          beta2(_mm256_set1_ps(a.beta2)),
          rest2(_mm256_set1_ps(a.rest2)),
          correction(_mm256_set1_ps(a.correction)),
          eps(_mm256_set1_ps(a.eps)),
          rate(_mm256_set1_ps(a.rate)) {}

    __m256 step(__m256 p, __m256 m, __m256 v) const {
        const __m256 denominator = _mm256_add_ps(_mm256_div_ps(_mm256_sqrt_ps(v), correction), eps);
        return _mm256_add_ps(_mm256_mul_ps(decay, p), _mm256_div_ps(_mm256_mul_ps(rate, m), denominator));
    }
};

template <class T>
void step_32bit(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    const Constants c(a);
    const bool from_old = a.rest1 < 0.5f;
    const __m256 weight = _mm256_set1_ps(from_old ? a.rest1 : a.rest1 - 1);
    const int64_t whole = last - (last - first) % 8;
    for (int64_t i = first; i < whole; i += 8) {
        const __m256 g = T::load(t.grad, i), old = _mm256_loadu_ps(t.m + i);
        const __m256 m = _mm256_fmadd_ps(weight, _mm256_sub_ps(g, old), from_old ? old : g);
        const __m256 decayed = _mm256_mul_ps(c.beta2, _mm256_loadu_ps(t.v + i));
        const __m256 v = _mm256_fmadd_ps(_mm256_mul_ps(c.rest2, g), g, decayed);
        _mm256_storeu_ps(t.m + i, m);
        _mm256_storeu_ps(t.v + i, v);
        T::store(t.param, i, c.step(T::load(t.param, i), m, v));
    }
    scalar_adamw.step_32bit(a, t, whole, last);
}

// out = table[codes], n values, a multiple of 8.
void look_up(const float* table, const uint8_t* codes, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 8) {
        const auto eight = load<uint64_t>(codes + i, 0);
        for (int k = 0; k < 8; ++k) out[i + k] = table[eight >> 8 * k & 255];
    }
}

__m256i magnitudes(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }

int32_t reduce_max(__m256i x) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    return _mm_cvtsi128_si32(most);
}

// The codes of a block of n values, whose statistic is the largest of these magnitudes (as bits, NaN on top).
void quantize(const Table8bit& table, float* x, int64_t n, __m256i most, uint8_t* codes, float* statistic) {
    const int32_t largest = reduce_max(most);
    const float absmax = load<float>(&largest, 0);
    *statistic = absmax;
    const __m256 reciprocal = _mm256_set1_ps(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax));

    const Lines& lines = table.lines;
    const __m256 sign = _mm256_set1_ps(lines.zero ? -0.0f : 0.0f);  // below zero a one-sided table has nothing to tell
    const __m256 rank_of_zero = _mm256_set1_ps(kRound + lines.zero), last = _mm256_set1_ps(lines.last);
    for (int64_t i = 0; i < n; i += 32) {
        __m256 scaled[4], size[4], least[4];
        __m256i code[4];
        for (int k = 0; k < 4; ++k) {
            scaled[k] = _mm256_mul_ps(_mm256_load_ps(x + i + 8 * k), reciprocal);
            // max and min return their second operand where either is NaN.
            size[k] = _mm256_max_ps(_mm256_set1_ps(kTiny), _mm256_andnot_ps(sign, scaled[k]));
            least[k] = _mm256_set1_ps(lines.intercept[lines.count - 1]);
        }
        for (int line = 0; line < lines.count - 1; ++line) {
            const __m256 slope = _mm256_set1_ps(lines.slope[line]), start = _mm256_set1_ps(lines.intercept[line]);
            for (int k = 0; k < 4; ++k) least[k] = _mm256_min_ps(least[k], _mm256_fmadd_ps(slope, size[k], start));
        }
        uint32_t doubtful = 0;
        for (int k = 0; k < 4; ++k) {
            const __m256 count = _mm256_or_ps(least[k], _mm256_and_ps(sign, scaled[k]));
            const __m256 rank = _mm256_add_ps(count, rank_of_zero);
            const __m256 off = _mm256_sub_ps(count, _mm256_sub_ps(rank, rank_of_zero));
            const __m256 distance = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), off);
            const __m256 doubt = _mm256_cmp_ps(distance, _mm256_set1_ps(0.5f - kDoubt), _CMP_NLT_UQ);
            doubtful |= static_cast<uint32_t>(_mm256_movemask_ps(doubt)) << 8 * k;

            const __m256 top = _mm256_cmp_ps(scaled[k], last, _CMP_GT_OQ);  // -1 where it holds
            code[k] = _mm256_sub_epi32(_mm256_castps_si256(rank), _mm256_castps_si256(top));
        }
        _mm_storeu_si128(at(codes, i), low_bytes(code[0], code[1]));
        _mm_storeu_si128(at(codes, i + 16), low_bytes(code[2], code[3]));
        if (doubtful) {
            for (int k = 0; k < 4; ++k) _mm256_store_ps(x + i + 8 * k, scaled[k]);
            search(table.search, x + i, doubtful, codes + i);
        }
    }
}

template <class T>
void step_8bit(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    const Constants c(a);
    alignas(32) float ms[kMostInBlock], vs[kMostInBlock];
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * tables.blocksize;
        look_up(tables.m.value, t.m.codes + begin, tables.blocksize, ms);
        look_up(tables.v.value, t.v.codes + begin, tables.blocksize, vs);
        const __m256 scale_m = _mm256_set1_ps(t.m.absmax[block]), scale_v = _mm256_set1_ps(t.v.absmax[block]);
        __m256i most_m = _mm256_setzero_si256(), most_v = most_m;
        for (int64_t i = 0; i < tables.blocksize; i += 8) {
            const __m256 p = T::load(t.param, begin + i), g = T::load(t.grad, begin + i);
            const __m256 square = _mm256_mul_ps(g, g);
            const __m256 finite = _mm256_cmp_ps(square, _mm256_set1_ps(kLargest), _CMP_LE_OQ);
            const __m256 old_m = _mm256_mul_ps(c.beta1, _mm256_mul_ps(_mm256_load_ps(ms + i), scale_m));
            const __m256 old_v = _mm256_mul_ps(c.beta2, _mm256_mul_ps(_mm256_load_ps(vs + i), scale_v));
            const __m256 m = _mm256_and_ps(finite, _mm256_add_ps(old_m, _mm256_mul_ps(c.rest1, g)));
            const __m256 v = _mm256_and_ps(finite, _mm256_add_ps(old_v, _mm256_mul_ps(c.rest2, square)));
            _mm256_store_ps(ms + i, m);
            _mm256_store_ps(vs + i, v);
            most_m = _mm256_max_epi32(most_m, magnitudes(m));
            most_v = _mm256_max_epi32(most_v, magnitudes(v));
            T::store(t.param, begin + i, _mm256_blendv_ps(p, c.step(p, m, v), finite));
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

const AdamwKernels avx2_adamw = {step_32bit_any, step_8bit_any};

}  // namespace halfbyte

#endif

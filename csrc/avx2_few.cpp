// The AVX2 tier's products of few rows, in fp32 for every type.
//
// Of 4 bits a group is 64 values of a row of W, which have one scale: 32 bytes of codes. Values of 16 bits are looked
// up by byte shuffles, 32 low bytes and 32 high ones at a time, and interleaved; their order along the depth, which
// results from that, `arrange` gives to x. Of bytes a group is 32 values, which are converted as they lie. One row is
// multiplied with values as they are made. For more, eight rows of W are expanded a stretch at a time, into cache, and
// serve all rows of x.

#if defined(__x86_64__)

#include "avx2.h"
#include "matmul.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace halfbyte {
namespace {

constexpr int64_t kStretch = kStretchBytes / 4, kRow = kArrangedBytes / 4;
constexpr int64_t kColumns = 8;   // rows of W at a time
constexpr int64_t kReadRows = 4;  // the same for one row of x
constexpr int64_t kTile = 3;      // rows of x at a time

// A group of 4-bit values, of which two are a byte.
struct Group4bit {
    using Weight = Weight4bit;
    static constexpr int64_t kGroup = 64;
    static const uint8_t* codes(const Weight4bit& w) { return w.codes; }
    static int64_t bytes(int64_t values) { return values / 2; }
};

// By permutes: values as they lie.
template <class T>
struct Permuted : Group4bit {
    using Type = T;
    Table<T> table;

    Permuted(const Weight4bit& w, float scale) : table(w.code, scale) {}

    // Call use(i, values) for the places i, i + 1, ... i + 7 of a half of a group, in order.
    template <int half, class Use>
    void each(const uint8_t* codes, const Use& use) const {
#pragma GCC unroll 4
        for (int i = 32 * half; i < 32 * half + 32; i += 8) use(i, table.look_up(codes + i / 2));
    }

    static int position(int i) { return i; }
};

// By byte shuffles, rounded to bf16.
struct Shuffled : Group4bit {
    using Type = Bf16;
    __m256i low, high;  // the bytes of the sixteen values, twice

    Shuffled(const Weight4bit& w, float scale) {
        const __m256 first = _mm256_loadu_ps(w.code), second = _mm256_loadu_ps(w.code + 8);
        const __m256i words = _mm256_packus_epi32(bits(_mm256_permute2f128_ps(first, second, 0x20), scale),
                                                  bits(_mm256_permute2f128_ps(first, second, 0x31), scale));
        const __m256i apart =
            _mm256_set_epi64x(0x0f0d0b0907050301, 0x0e0c0a0806040200, 0x0f0d0b0907050301, 0x0e0c0a0806040200);
        const __m256i bytes = _mm256_shuffle_epi8(words, apart);
        low = _mm256_permute4x64_epi64(bytes, 0x88);
        high = _mm256_permute4x64_epi64(bytes, 0xdd);
    }

    template <int half, class Use>
    void each(const uint8_t* codes, const Use& use) const {
        const __m256i mask = _mm256_set1_epi8(15), bytes = _mm256_loadu_si256(at(codes));
        const __m256i index = _mm256_and_si256(half ? bytes : _mm256_srli_epi16(bytes, 4), mask);
        const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
        each_of_words(_mm256_unpacklo_epi8(lows, highs), 32 * half, use);
        each_of_words(_mm256_unpackhi_epi8(lows, highs), 32 * half + 16, use);
    }

    // Which value of a group comes to place i.
    static int position(int i) {
        const int low_half = i / 32, upper = i / 16 % 2, odd = i / 8 % 2, lane = i / 4 % 2;
        return 2 * (16 * lane + 8 * upper + 2 * (i % 4) + odd) + low_half;
    }

  private:
    static __m256i bits(__m256 code, float scale) {
        const __m256 value = Bf16::nearest(_mm256_mul_ps(code, _mm256_set1_ps(scale)));
        return _mm256_srli_epi32(_mm256_castps_si256(value), 16);
    }

    template <class Use>
    static void each_of_words(__m256i words, int i, const Use& use) {
        use(i, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
        use(i + 8, _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000)))));
    }

    static const __m256i* at(const void* x) { return static_cast<const __m256i*>(x); }
};

// Bytes times their scale, rounded to T: values as they lie.
template <class T>
struct Converted {
    using Type = T;
    using Weight = Weight8bit;
    static constexpr int64_t kGroup = 32;
    __m256 scale;

    static const uint8_t* codes(const Weight8bit& w) { return reinterpret_cast<const uint8_t*>(w.codes); }
    static int64_t bytes(int64_t values) { return values; }

    Converted(const Weight8bit&, float scale) : scale(_mm256_set1_ps(scale)) {}

    template <int half, class Use>
    void each(const uint8_t* codes, const Use& use) const {
#pragma GCC unroll 2
        for (int i = 16 * half; i < 16 * half + 16; i += 8) {
            const __m256i values = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
            use(i, T::nearest(_mm256_mul_ps(_mm256_cvtepi32_ps(values), scale)));
        }
    }
};

// Values of a dense W in the type of x, whose rows lie without gaps.
template <class T>
struct Loaded {
    using Type = T;
    using Weight = Dense;
    static constexpr int64_t kGroup = 32;

    static const uint8_t* codes(const Dense& w) { return static_cast<const uint8_t*>(w.values); }
    static int64_t bytes(int64_t values) { return values * T::kSize; }

    Loaded(const Dense&, float) {}

    template <int half, class Use>
    void each(const uint8_t* values, const Use& use) const {
#pragma GCC unroll 2
        for (int i = 16 * half; i < 16 * half + 16; i += 8) use(i, T::load(values, i));
    }
};

inline void read_scales(const Dense&, int64_t, int64_t, int64_t, float*) {}

template <class L>
void arrange(const void* x, int64_t rows, int64_t depth, void* arranged) {
    using T = typename L::Type;
    constexpr int64_t kGroup = L::kGroup;
    __m256i index[8];
    for (int i = 0; i < 64; ++i) reinterpret_cast<int32_t*>(index)[i] = L::position(i);
    float* out = static_cast<float*>(arranged);
    for (int64_t begin = 0; begin < depth; begin += kStretch) {
        const int64_t end = least(begin + kStretch, depth);
        for (int64_t r = 0; r < rows; ++r, out += kRow) {
            for (int64_t i = begin; i < end; i += kGroup) {
                float group[kGroup];
                for (int64_t j = 0; j < kGroup; j += 8) Fp32::store(group, j, T::load(x, r * depth + i + j));
                for (int64_t j = 0; j < 8; ++j) {
                    _mm256_storeu_ps(out + (i - begin) + 8 * j, _mm256_i32gather_ps(group, index[j], 4));
                }
            }
        }
    }
}

// As x lies.
template <class T>
void arrange_bytes(const void* x, int64_t rows, int64_t depth, void* arranged) {
    float* out = static_cast<float*>(arranged);
    for (int64_t begin = 0; begin < depth; begin += kStretch) {
        const int64_t count = least(kStretch, depth - begin);
        for (int64_t r = 0; r < rows; ++r, out += kRow) {
            for (int64_t i = 0; i < count; i += 8) Fp32::store(out, i, T::load(x, r * depth + begin + i));
        }
    }
}

float total(__m256 a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// sums = (add ? sums : 0) + a stretch of `columns` rows of W times `rows` of x.
template <int rows, int columns>
void multiply_tile(const float* w, int64_t count, const float* x, float* sums, bool add) {
    __m256 sum[rows][columns];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; ++c) sum[r][c] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < count; i += 8) {
        __m256 from_x[rows];
        for (int r = 0; r < rows; ++r) from_x[r] = _mm256_loadu_ps(x + r * kRow + i);
        for (int c = 0; c < columns; ++c) {
            const __m256 from_w = _mm256_loadu_ps(w + c * kRow + i);
            for (int r = 0; r < rows; ++r) sum[r][c] = _mm256_fmadd_ps(from_x[r], from_w, sum[r][c]);
        }
    }
    for (int r = 0; r < rows; ++r, sums += kStrip) {
        for (int c = 0; c < columns; ++c) sums[c] = add ? sums[c] + total(sum[r][c]) : total(sum[r][c]);
    }
}

// One row of x times `count` rows of W from `column` on, at most kReadRows. What does not wait for each other stands
// close together: the tables of all rows of W, then halves of groups in turn.
template <class L>
void read_row(const typename L::Weight& w, int64_t column, int64_t count, const float* x, float* sums) {
    constexpr int64_t kGroup = L::kGroup;
    const int64_t depth = w.columns;
    for (int64_t begin = 0; begin < depth; begin += kStretch, x += kRow) {
        const int64_t values = least(kStretch, depth - begin);
        const uint8_t* codes[kReadRows];
        float scales[kReadRows][kStretch / kGroup] = {};
        __m256 sum[kReadRows];
        for (int64_t c = 0; c < kReadRows; ++c) {  // the last row again where there are no more
            const int64_t first = (column + least(c, count - 1)) * depth + begin;
            codes[c] = L::codes(w) + L::bytes(first);
            read_scales(w, first, kGroup, values / kGroup, scales[c]);
            sum[c] = _mm256_setzero_ps();
        }
        for (int64_t j = 0; j < values; j += kGroup) {
            const L tables[kReadRows] = {{w, scales[0][j / kGroup]},
                                         {w, scales[1][j / kGroup]},
                                         {w, scales[2][j / kGroup]},
                                         {w, scales[3][j / kGroup]}};
            const auto multiply_add = [&](int c) {
                return [&sum = sum[c], x, j](int i, __m256 looked_up) {
                    sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + j + i), looked_up, sum);
                };
            };
#pragma GCC unroll 4
            for (int c = 0; c < kReadRows; ++c) tables[c].template each<0>(codes[c] + L::bytes(j), multiply_add(c));
#pragma GCC unroll 4
            for (int c = 0; c < kReadRows; ++c) {
                const uint8_t* const from = codes[c] + L::bytes(j);
                tables[c].template each<1>(from, multiply_add(c));
                _mm_prefetch(reinterpret_cast<const char*>(from + L::bytes(kReadRows * depth)), _MM_HINT_T0);
            }
        }
        for (int c = 0; c < kReadRows; ++c) sums[c] = begin > 0 ? sums[c] + total(sum[c]) : total(sum[c]);
    }
}

template <class L>
void dot(const typename L::Weight& w, int64_t column, int64_t columns, const void* arranged, int64_t rows,
         float* sums) {
    constexpr int64_t kGroup = L::kGroup;
    if (rows == 1) {
        for (int64_t c = 0; c < columns; c += kReadRows) {
            read_row<L>(w, column + c, least(kReadRows, columns - c), static_cast<const float*>(arranged), sums + c);
        }
        return;
    }
    alignas(64) float expanded[kColumns * kRow];
    const int64_t depth = w.columns;
    for (int64_t c = 0; c < columns; c += kColumns) {
        const int64_t count = least(kColumns, columns - c);
        const float* x = static_cast<const float*>(arranged);
        for (int64_t begin = 0; begin < depth; begin += kStretch, x += rows * kRow) {
            const int64_t values = least(kStretch, depth - begin);
            for (int64_t i = 0; i < kColumns; ++i) {  // the last row again where there are no eight
                const int64_t first = (column + c + least(i, count - 1)) * depth + begin;
                float scales[kStretch / kGroup] = {};
                read_scales(w, first, kGroup, values / kGroup, scales);
                for (int64_t j = 0; j < values; j += kGroup) {
                    const uint8_t* const codes = L::codes(w) + L::bytes(first + j);
                    _mm_prefetch(reinterpret_cast<const char*>(codes + L::bytes(kColumns * depth)), _MM_HINT_T0);
                    float* const out = expanded + i * kRow + j;
                    const L table(w, scales[j / kGroup]);
                    const auto store = [&](int place, __m256 value) { _mm256_storeu_ps(out + place, value); };
                    table.template each<0>(codes, store);
                    table.template each<1>(codes, store);
                }
            }
            const bool add = begin > 0;
            for (int64_t r = 0; r < rows; r += kTile) {
                const float* const tile = x + r * kRow;
                float* const out = sums + r * kStrip + c;
                if (rows - r == 1) {
                    multiply_tile<1, 8>(expanded, values, tile, out, add);
                    continue;
                }
                for (int64_t i = 0; i < kColumns; i += 4) {
                    const float* const from = expanded + i * kRow;
                    if (rows - r == 2) {
                        multiply_tile<2, 4>(from, values, tile, out + i, add);
                    } else {
                        multiply_tile<3, 4>(from, values, tile, out + i, add);
                    }
                }
            }
        }
    }
}

template <class L>
constexpr FewKernels few = {16,
                            4,
                            true,
                            arrange<L>,
                            dot<L>,
                            arrange_bytes<typename L::Type>,
                            dot<Converted<typename L::Type>>,
                            dot<Loaded<typename L::Type>>};

}  // namespace

const FewKernels avx2_few_fp32 = few<Permuted<Fp32>>;
const FewKernels avx2_few_bf16 = few<Shuffled>;
const FewKernels avx2_few_fp16 = few<Permuted<Fp16>>;

}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

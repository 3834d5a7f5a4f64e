// The AVX-512 tier's products of few rows.
//
// Of 4 bits a group is 128 values of a row of W: 64 bytes of codes, looked up as they lie. Nibble k of every 16-bit
// word (pairs of bf16), or of every 32-bit lane (fp32), makes one vector of values, so that a shift is all that it
// takes; the order that results, `arrange` gives to x. The two blocks of a group are the halves of a register: a lookup
// reads one bit more than a code has, and that bit tells them apart. Of bytes a group is 32 values, which are converted
// as they lie; dense values are read so.
//
// Up to four rows, values are multiplied as they are looked up: then reading W from memory bounds the product. For
// more, eight rows of W are expanded a stretch at a time, into cache, and serve all rows of x.
//
// The whole file is compiled with AVX512_BF16; see avx512_matmul.cpp.

#if defined(__x86_64__)

#include "avx512.h"
#include "matmul.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace halfbyte {
namespace {

constexpr int64_t kFused = 4;     // rows of x that are multiplied at once with values in registers
constexpr int kColumns = 4;       // rows of W that are multiplied at once
constexpr int kExpanded = 8;      // rows of W that are expanded at once
constexpr int64_t kTileRows = 6;  // rows of x that are multiplied with them at once
constexpr int64_t kAhead = 8192;  // bytes that W is asked for ahead, at least

// The first multiple of `step` behind kAhead: how far on bytes are asked for that come in steps of `step`. They are
// asked for into the second cache: the nearest one has too few places for what is on its way.
int64_t ahead_of(int64_t step) { return (kAhead / step + 1) * step; }

// The indices of nibble k.
__m512i nibbles(__m512i codes, int k) {
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const __m512i shifted = _mm512_srli_epi32(codes, 4 * k);
    return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(15), second, 0xea);  // (shifted & 15) | second
}

// Sixteen bytes times their scale.
__m512 scaled(const int8_t* codes, __m512 scale) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
}

// Vectors of 32 bf16 values, multiplied in pairs.
struct Pairs {
    using Element = uint16_t;
    static constexpr int64_t kWidth = 32;

    struct Table {
        __m512i both;

        Table(__m512 first, __m512 second) : both((__m512i)_mm512_cvtne2ps_pbh(second, first)) {}

        __m512i look_up(__m512i codes, int k) const { return _mm512_permutexvar_epi16(nibbles(codes, k), both); }
    };

    // A group: value 4 j + (k ^ 1) to element j of vector k.
    static void arrange(const uint16_t* x, uint16_t* out) {
        // clang-format off
        const __m512i step = _mm512_set_epi16(  // every fourth of 64 values, twice
            60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0,
            60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
        // clang-format on
        const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
        const __m512i c = _mm512_loadu_si512(x + 64), d = _mm512_loadu_si512(x + 96);
        for (int k = 0; k < 4; ++k) {
            const __m512i index = _mm512_add_epi16(step, _mm512_set1_epi16(static_cast<int16_t>(k ^ 1)));
            const __m512i low = _mm512_permutex2var_epi16(a, index, b), high = _mm512_permutex2var_epi16(c, index, d);
            _mm512_storeu_si512(out + 32 * k, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
        }
    }

    static void copy(const void* x, int64_t count, uint16_t* out) {
        std::memcpy(out, x, static_cast<size_t>(count) * sizeof *out);
    }

    // Vector k of a group of bytes.
    static __m512i convert(const int8_t* codes, __m512 scale, int) {
        return (__m512i)_mm512_cvtne2ps_pbh(scaled(codes + 16, scale), scaled(codes, scale));
    }

    // Vector k of a group of a dense W.
    static __m512i load(const void* values, int k) { return _mm512_loadu_si512(at(values, kWidth * k, 2)); }

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
};

// Vectors of sixteen fp32 values, W rounded to the type T.
template <class T>
struct Singles {
    using Element = float;
    static constexpr int64_t kWidth = 16;

    struct Table {
        __m512 first, second;

        Table(__m512 first, __m512 second) : first(T::nearest(first)), second(T::nearest(second)) {}

        __m512i look_up(__m512i codes, int k) const {
            return _mm512_castps_si512(_mm512_permutex2var_ps(first, nibbles(codes, k), second));
        }
    };

    // A group: value 8 j + (k ^ 1) to element j of vector k.
    static void arrange(const float* x, float* out) {
        const __m512i step = _mm512_set_epi32(120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8, 0);
        for (int k = 0; k < 8; ++k) _mm512_storeu_ps(out + 16 * k, _mm512_i32gather_ps(step, x + (k ^ 1), 4));
    }

    // Writes up to 15 more.
    static void copy(const void* x, int64_t count, float* out) {
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) Fp32::store(out, i, T::load(x, i));
        for (; i < count; i += 16) {
            float rest[16] = {};
            std::memcpy(rest, at(x, i, T::kSize), static_cast<size_t>((count - i) * T::kSize));
            Fp32::store(out, i, T::load(rest, 0));
        }
    }

    static __m512i convert(const int8_t* codes, __m512 scale, int k) {
        return _mm512_castps_si512(T::nearest(scaled(codes + 16 * k, scale)));
    }

    static __m512i load(const void* values, int k) { return _mm512_castps_si512(T::load(values, kWidth * k)); }

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
    }
};

template <class L>
constexpr int64_t kStretch = kStretchBytes / static_cast<int64_t>(sizeof(typename L::Element));

template <class L>
constexpr int64_t kRow = kArrangedBytes / static_cast<int64_t>(sizeof(typename L::Element));

template <class L, class T>
void arrange(const void* x, int64_t rows, int64_t depth, void* arranged) {
    constexpr int64_t size = 128;  // of a group of 4-bit values
    auto* out = static_cast<typename L::Element*>(arranged);
    for (int64_t begin = 0; begin < depth; begin += kStretch<L>) {
        const int64_t end = least(begin + kStretch<L>, depth);
        for (int64_t r = 0; r < rows; ++r, out += kRow<L>) {
            for (int64_t i = begin; i < end; i += size) {
                typename L::Element group[size] = {};
                L::copy(at(x, r * depth + i, T::kSize), least(size, end - i), group);
                L::arrange(group, out + (i - begin));
            }
        }
    }
}

// As x lies.
template <class L, class T>
void arrange_bytes(const void* x, int64_t rows, int64_t depth, void* arranged) {
    auto* out = static_cast<typename L::Element*>(arranged);
    for (int64_t begin = 0; begin < depth; begin += kStretch<L>) {
        const int64_t count = least(kStretch<L>, depth - begin);
        for (int64_t r = 0; r < rows; ++r, out += kRow<L>) L::copy(at(x, r * depth + begin, T::kSize), count, out);
    }
}

// The scales of `count` runs of 64 values from position `first` on; sixteen are written. `code` is the nested one.
void read_runs(const Weight4bit& w, const __m512* code, int64_t first, int64_t count, float* out) {
    const Scales& scales = w.scales;
    if (!scales.nested || w.blocksize.value() != 64) return read_scales(w, first, 64, count, out);
    const int64_t block = first / 64, group = w.nested_blocksize.quotient(block);
    if (w.nested_blocksize.quotient(block + count - 1) != group) return read_scales(w, first, 64, count, out);
    const auto some = static_cast<__mmask16>((1 << count) - 1);
    const __m128i absmax = _mm_maskz_loadu_epi8(some, static_cast<const uint8_t*>(scales.absmax) + block);
    const __m512 value = pick256(_mm512_cvtepu8_epi32(absmax), code);
    const __m512 factor = _mm512_set1_ps(load<float>(scales.nested_absmax, group));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_mul_ps(value, factor), _mm512_set1_ps(scales.offset)));
}

// What reads W of 4 bits: groups of a stretch of one of its rows, `count` values, a multiple of 64.
template <class L>
class Reader4bit {
  public:
    static constexpr int64_t kGroup = 128;

    struct Stretch {
        const uint8_t* codes;
        float scales[kStretchBytes / 128];
    };

    // `step`: rows of W that are read together.
    Reader4bit(const Weight4bit& w, int64_t step)
        : w_(w), code_(_mm512_loadu_ps(w.code)), ahead_(ahead_of(step * w.columns / 2)) {
        for (int i = 0; i < 16; ++i) nested_code_[i] = _mm512_loadu_ps(w.scales.nested_code + 16 * i);
    }

    // Before the groups of a stretch are read.
    void begin(int64_t count) { count_ = count; }
    int64_t count() const { return count_; }

    void stretch(int64_t first, Stretch& out) const {
        out.codes = w_.codes + first / 2;
        read_runs(w_, nested_code_, first, count_ / 64, out.scales);
    }

    struct Group {
        typename L::Table table;
        __m512i codes;

        __m512i vector(int k) const { return table.look_up(codes, k); }
    };

    // Where not `whole`, the second half is zero.
    template <bool whole>
    Group group(const Stretch& from, int64_t i) const {
        const uint8_t* const bytes = from.codes + i / 2;
        _mm_prefetch(reinterpret_cast<const char*>(bytes + ahead_), _MM_HINT_T1);
        const __m512 first = _mm512_mul_ps(code_, _mm512_set1_ps(from.scales[i / 64]));
        if (whole) {
            const __m512 second = _mm512_mul_ps(code_, _mm512_set1_ps(from.scales[i / 64 + 1]));
            return {{first, second}, _mm512_loadu_si512(bytes)};
        }
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
        return {{first, _mm512_setzero_ps()}, _mm512_zextsi256_si512(half)};
    }

  private:
    const Weight4bit& w_;
    __m512 code_, nested_code_[16];
    int64_t ahead_, count_ = 0;
};

// The same of bytes; `count` is a multiple of 32.
template <class L>
class Reader8bit {
  public:
    static constexpr int64_t kGroup = 32;

    struct Stretch {
        const int8_t* codes;
        float scales[kStretchBytes / 64];
    };

    Reader8bit(const Weight8bit& w, int64_t step) : w_(w), ahead_(ahead_of(step * w.columns)) {}

    void begin(int64_t count) { count_ = count; }
    int64_t count() const { return count_; }

    void stretch(int64_t first, Stretch& out) const {
        out.codes = w_.codes + first;
        read_scales(w_, first, kGroup, count_ / kGroup, out.scales);
    }

    struct Group {
        const int8_t* codes;
        __m512 scale;

        __m512i vector(int k) const { return L::convert(codes, scale, k); }
    };

    template <bool>
    Group group(const Stretch& from, int64_t i) const {
        const int8_t* const codes = from.codes + i;
        _mm_prefetch(reinterpret_cast<const char*>(codes + ahead_), _MM_HINT_T1);
        return {codes, _mm512_set1_ps(from.scales[i / kGroup])};
    }

  private:
    const Weight8bit& w_;
    int64_t ahead_, count_ = 0;
};

// The same of a dense W whose rows lie without gaps, in values of the type T.
template <class L, class T>
class ReaderDense {
  public:
    static constexpr int64_t kGroup = 32;

    struct Stretch {
        const char* values;
    };

    ReaderDense(const Dense& w, int64_t step) : w_(w), ahead_(ahead_of(step * w.columns * T::kSize)) {}

    void begin(int64_t count) { count_ = count; }
    int64_t count() const { return count_; }

    void stretch(int64_t first, Stretch& out) const { out.values = at(w_.values, first, T::kSize); }

    struct Group {
        const char* values;

        __m512i vector(int k) const { return L::load(values, k); }
    };

    template <bool>
    Group group(const Stretch& from, int64_t i) const {
        const char* const values = from.values + i * T::kSize;
        _mm_prefetch(values + ahead_, _MM_HINT_T1);
        if (T::kSize == 4) _mm_prefetch(values + ahead_ + 64, _MM_HINT_T1);
        return {values};
    }

  private:
    const Dense& w_;
    int64_t ahead_, count_ = 0;
};

// The sum of each of four registers.
__m128 totals(const __m512* a) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

template <int rows>
void finish_tile(const __m512 (*sum)[kColumns], float* sums, bool add) {
    for (int r = 0; r < rows; ++r, sums += kStrip) {
        const __m128 total = totals(sum[r]);
        _mm_storeu_ps(sums, add ? _mm_add_ps(_mm_loadu_ps(sums), total) : total);
    }
}

// A group, or what is left of one, of four rows of W times `rows` of x.
template <class L, class R, bool whole, int rows>
inline void add_group(const R& reader, const typename R::Stretch* w, int64_t i, const typename L::Element* x,
                      __m512 (*sum)[kColumns]) {
    const typename R::Group group[kColumns] = {reader.template group<whole>(w[0], i),
                                               reader.template group<whole>(w[1], i),
                                               reader.template group<whole>(w[2], i),
                                               reader.template group<whole>(w[3], i)};
#pragma GCC unroll 8
    for (int k = 0; k < R::kGroup / L::kWidth; ++k) {
        __m512i from_w[kColumns];
        for (int c = 0; c < kColumns; ++c) from_w[c] = group[c].vector(k);
        for (int r = 0; r < rows; ++r) {
            const __m512i from_x = _mm512_loadu_si512(x + r * kRow<L> + i + k * L::kWidth);
            for (int c = 0; c < kColumns; ++c) sum[r][c] = L::multiply_add(from_x, from_w[c], sum[r][c]);
        }
    }
}

// A stretch of four rows of W times `rows` of x, made on the way.
template <class L, class R, int rows>
void read_tile(const R& reader, const typename R::Stretch* w, const typename L::Element* x, float* sums, bool add) {
    __m512 sum[rows][kColumns];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_setzero_ps();
    }
    int64_t i = 0;
    for (; i + R::kGroup <= reader.count(); i += R::kGroup) add_group<L, R, true, rows>(reader, w, i, x, sum);
    if (i < reader.count()) add_group<L, R, false, rows>(reader, w, i, x, sum);
    finish_tile<rows>(sum, sums, add);
}

// The values of a group, or of what is left of one.
template <class L, class R, bool whole>
inline void store_group(const R& reader, const typename R::Stretch& w, int64_t i, typename L::Element* out) {
    const typename R::Group group = reader.template group<whole>(w, i);
#pragma GCC unroll 8
    for (int k = 0; k < R::kGroup / L::kWidth; ++k) _mm512_storeu_si512(out + i + k * L::kWidth, group.vector(k));
}

// The values of a stretch.
template <class L, class R>
void expand(const R& reader, const typename R::Stretch& w, typename L::Element* out) {
    int64_t i = 0;
    for (; i + R::kGroup <= reader.count(); i += R::kGroup) store_group<L, R, true>(reader, w, i, out);
    if (i < reader.count()) store_group<L, R, false>(reader, w, i, out);
}

// The same as read_tile, of values that are expanded.
template <class L, int rows>
void multiply_tile(const typename L::Element* w, int64_t count, const typename L::Element* x, float* sums, bool add) {
    __m512 sum[rows][kColumns];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < count; i += L::kWidth) {
        __m512i from_w[kColumns];
        for (int c = 0; c < kColumns; ++c) from_w[c] = _mm512_loadu_si512(w + c * kRow<L> + i);
        for (int r = 0; r < rows; ++r) {
            const __m512i from_x = _mm512_loadu_si512(x + r * kRow<L> + i);
            for (int c = 0; c < kColumns; ++c) sum[r][c] = L::multiply_add(from_x, from_w[c], sum[r][c]);
        }
    }
    finish_tile<rows>(sum, sums, add);
}

// `rows` of x times `columns` rows of W, in registers or from cache, stretch by stretch.
template <class L, class R, int columns>
void dot_columns(R& reader, int64_t depth, int64_t column, int64_t last, const void* arranged, int64_t rows,
                 float* sums) {
    alignas(64) typename L::Element expanded[columns * kRow<L>];
    const auto* x = static_cast<const typename L::Element*>(arranged);
    for (int64_t begin = 0; begin < depth; begin += kStretch<L>, x += rows * kRow<L>) {
        const int64_t count = least(kStretch<L>, depth - begin);
        reader.begin(count);
        typename R::Stretch from[columns];  // of the last row again where there are no more
        for (int64_t i = 0; i < columns; ++i) reader.stretch(least(column + i, last) * depth + begin, from[i]);
        const bool add = begin > 0;
        if constexpr (columns == kColumns) {
            switch (rows) {
                case 1: read_tile<L, R, 1>(reader, from, x, sums, add); break;
                case 2: read_tile<L, R, 2>(reader, from, x, sums, add); break;
                case 3: read_tile<L, R, 3>(reader, from, x, sums, add); break;
                default: read_tile<L, R, kFused>(reader, from, x, sums, add); break;
            }
        } else {
            for (int i = 0; i < columns; ++i) expand<L>(reader, from[i], expanded + i * kRow<L>);
            const int64_t padded = (count + R::kGroup - 1) / R::kGroup * R::kGroup;
            for (int64_t r = 0, n; r < rows; r += n) {
                const int64_t tiles = (rows - r + kTileRows - 1) / kTileRows;
                n = (rows - r + tiles - 1) / tiles;  // 3 to 6: as many in each tile as can be
                const auto* tile = x + r * kRow<L>;
                for (int64_t i = 0; i < columns; i += kColumns) {
                    const auto* const from_w = expanded + i * kRow<L>;
                    float* const out = sums + r * kStrip + i;
                    switch (n) {
                        case 3: multiply_tile<L, 3>(from_w, padded, tile, out, add); break;
                        case 4: multiply_tile<L, 4>(from_w, padded, tile, out, add); break;
                        case 5: multiply_tile<L, 5>(from_w, padded, tile, out, add); break;
                        default: multiply_tile<L, 6>(from_w, padded, tile, out, add); break;
                    }
                }
            }
        }
    }
}

template <class L, class R, class Weight>
void dot(const Weight& w, int64_t column, int64_t columns, const void* arranged, int64_t rows, float* sums) {
    const auto part = rows <= kFused ? dot_columns<L, R, kColumns> : dot_columns<L, R, kExpanded>;
    const int64_t step = rows <= kFused ? kColumns : kExpanded;
    R reader(w, step);
    for (int64_t c = 0; c < columns; c += step) {
        part(reader, w.columns, column + c, column + columns - 1, arranged, rows, sums + c);
    }
}

template <class L, class T>
constexpr FewKernels few = {16,
                            sizeof(typename L::Element),
                            true,
                            arrange<L, T>,
                            dot<L, Reader4bit<L>, Weight4bit>,
                            arrange_bytes<L, T>,
                            dot<L, Reader8bit<L>, Weight8bit>,
                            dot<L, ReaderDense<L, T>, Dense>};

}  // namespace

const FewKernels avx512_few_pairs = few<Pairs, Bf16>;
const FewKernels avx512_few_fp32 = few<Singles<Fp32>, Fp32>;
const FewKernels avx512_few_bf16 = few<Singles<Bf16>, Bf16>;
const FewKernels avx512_few_fp16 = few<Singles<Fp16>, Fp16>;

}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

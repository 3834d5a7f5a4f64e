// The AVX-512 tier's products: bf16 in pairs by VDPBF16PS where the chip has it (AVX512_BF16), everything else in
// fp32.
//
// Sixteen lanes at a time. A block of W has only sixteen different values: they are made once per block, scaled and
// rounded, and looked up. A panel is kLanes rows of kStrip lanes; six rows of x by a strip keep 24 sums in registers,
// so that ten loads feed 24 multiplications.
//
// The whole file is compiled with AVX512_BF16, since its intrinsics need it and a compiler uses it for nothing else.

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

// Lanes of two bf16 values.
struct Pairs {
    using Element = uint16_t;
    static constexpr int kPerLane = 2;  // values in a lane

    // The sixteen values of a block, twice, since a lookup reads five bits.
    static __m512i table(__m512 values) { return (__m512i)_mm512_cvtne2ps_pbh(values, values); }

    // 32 values from sixteen bytes.
    static __m512i look_up(__m512i table, const uint8_t* codes) {
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        // clang-format off
        const __m512i spread = _mm512_set_epi64(  // a byte to each word, twice
            0x800f800f800e800e, 0x800d800d800c800c, 0x800b800b800a800a, 0x8009800980088008,
            0x8007800780068006, 0x8005800580048004, 0x8003800380028002, 0x8001800180008000);
        // clang-format on
        const __m512i words = _mm512_shuffle_epi8(bytes, spread);
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_set1_epi32(4)), table);
    }

    // 32 values, the second sixteen of which `high` gives.
    template <class High>
    static __m512i round(__m512 low, const High& high) {
        return (__m512i)_mm512_cvtne2ps_pbh(high(), low);
    }

    // The first `count` of 32 values of type S.
    template <class S>
    static __m512i from(const void* x, int64_t i, int64_t count) {
        return round(S::load(x, i, first16(count)),
                     [&] { return S::load(x, i + 16, first16(count < 16 ? 0 : count - 16)); });
    }

    // Two rows of 32 values, as pairs.
    static void store(float* panel, __m512i even, __m512i odd) {
        // clang-format off
        const __m512i low = _mm512_set_epi32(
            0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
            0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
        // clang-format on
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        _mm512_store_si512(panel, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(panel + 16, _mm512_permutex2var_epi16(even, high, odd));
    }

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
};

// As they are.
template <>
__m512i Pairs::from<Bf16>(const void* x, int64_t i, int64_t count) {
    return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, at(x, i, 2));
}

// Results of the same unit.
struct Bf16OfUnit : Bf16 {
    static void store(void* out, int64_t i, __m512 value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(out, i, 2)), (__m256i)_mm512_cvtneps_pbh(value));
    }
};

// Lanes of one fp32 value, W rounded to the type T.
template <class T>
struct Singles {
    using Element = float;
    static constexpr int kPerLane = 1;

    static __m512i table(__m512 values) { return _mm512_castps_si512(T::nearest(values)); }

    // Sixteen values from eight bytes.
    static __m512i look_up(__m512i table, const uint8_t* codes) {
        const __m512i bytes = _mm512_set1_epi64(load<int64_t>(codes, 0));
        const __m512i spread = _mm512_set_epi32(  // a byte to each lane, twice
            int(0x80808007), int(0x80808007), int(0x80808006), int(0x80808006), int(0x80808005), int(0x80808005),
            int(0x80808004), int(0x80808004), int(0x80808003), int(0x80808003), int(0x80808002), int(0x80808002),
            int(0x80808001), int(0x80808001), int(0x80808000), int(0x80808000));
        const __m512i lanes = _mm512_shuffle_epi8(bytes, spread);
        return _mm512_permutexvar_epi32(_mm512_srlv_epi32(lanes, _mm512_set1_epi64(4)), table);
    }

    // Sixteen values; there are no second sixteen.
    template <class High>
    static __m512i round(__m512 low, const High&) {
        return _mm512_castps_si512(T::nearest(low));
    }

    // The first `count` of sixteen values of type S.
    template <class S>
    static __m512i from(const void* x, int64_t i, int64_t count) {
        return round(S::load(x, i, first16(count)), 0);
    }

    static void store(float* panel, __m512i row, __m512i) { _mm512_store_si512(panel, row); }

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
    }
};

// Ask for a line.
template <_mm_hint hint = _MM_HINT_T0>
void ask_for(const void* line) {
    _mm_prefetch(static_cast<const char*>(line), hint);
}

// The sixteen values of a block, scaled.
__m512 scaled(const float* code, float scale) { return _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale)); }

// The `count` values of W from position `first` of the flattened weight on, wherever they lie, padded with zeros to a
// multiple of sixteen lanes.
template <class L>
void copy_values(const Weight4bit& w, int64_t first, int64_t count, typename L::Element* out) {
    alignas(64) typename L::Element values[16 * L::kPerLane];
    int64_t block = -1;
    int64_t n = 0;
    for (; n < count; ++n) {
        const int64_t i = first + n;
        if (w.blocksize.quotient(i) != block) {
            float scale;
            read_scales(w, i, 0, 1, &scale);
            _mm512_store_si512(values, L::table(scaled(w.code, scale)));
            block = w.blocksize.quotient(i);
        }
        out[n] = values[code_at(w.codes, i)];
    }
    for (; n % (16 * L::kPerLane); ++n) out[n] = 0;
}

// Sixteen rows of sixteen lanes, `stride` bytes apart, to columns of a panel.
void transpose(const void* in, int64_t stride, float* panel) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(at(in, i * stride, 1));
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    }
    // a[4 i + j]: of rows 4 i .. 4 i + 3 the lanes j, j + 4, j + 8 and j + 12
    for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512(panel + (j + 0) * kStrip, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_store_si512(panel + (j + 4) * kStrip, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_store_si512(panel + (j + 8) * kStrip, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_store_si512(panel + (j + 12) * kStrip, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Sixteen rows of W at a time, eight vectors of each: a whole cache line of codes and more, since lines of rows that
// are a power of two apart drive each other out. Columns beyond the last are the last again.
template <class L>
void expand_forward(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    constexpr int64_t width = 16 * L::kPerLane, segment = 8 * width;
    alignas(64) typename L::Element rows[16][segment];
    float scales[16][kLanes * L::kPerLane / 32];
    const uint8_t* codes = w.codes;
    const int64_t piece = least(w.piece, segment);
    for (int64_t c = 0; c < kStrip; c += 16) {
        int64_t row[16];
        for (int64_t r = 0; r < 16; ++r) {
            row[r] = least(column + c + r, w.rows - 1) * w.columns;
            if (piece) read_scales(w, row[r] + first, piece, (last - first) / piece, scales[r]);
        }
        for (int64_t begin = first; begin < last; begin += segment) {
            const int64_t end = least(begin + segment, last);
            for (int64_t r = 0; r < 16; ++r) {
                if (!piece) {
                    copy_values<L>(w, row[r] + begin, end - begin, rows[r]);
                    continue;
                }
                const uint8_t* from = codes + ((row[r] + begin) >> 1);
                // asked for is this segment of the sixteen rows that come next; the next segment is too near
                for (int64_t byte = 0; byte < segment / 2; byte += 64) ask_for(from + 8 * w.columns + byte);
                typename L::Element* to = rows[r];
                const float* scale = scales[r] + (begin - first) / piece;
                for (int64_t i = begin; i < end; i += piece) {
                    const __m512i table = L::table(scaled(w.code, *scale++));
                    for (int64_t j = 0; j < piece; j += width, from += width / 2, to += width) {
                        _mm512_store_si512(to, L::look_up(table, from));
                    }
                }
            }
            for (int64_t i = begin; i < end; i += width) {
                transpose(rows[0] + (i - begin), sizeof rows[0], panel + (i - first) / L::kPerLane * kStrip + c);
            }
        }
    }
}

// Where W is in pieces, a strip is one or two of them wide.
template <class L>
void expand_gradient(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    constexpr int64_t width = 16 * L::kPerLane;
    const int64_t columns = least(kStrip, w.columns - column), piece = least(w.piece, kStrip);
    float scales[2][kLanes * L::kPerLane];
    for (int64_t c = 0; piece && c < columns; c += piece) {
        read_scales(w, first * w.columns + column + c, w.columns, last - first, scales[c > 0]);
    }
    for (int64_t n = first; n < last; n += L::kPerLane, panel += kStrip) {
        const bool both = L::kPerLane == 2 && n + 1 < last;  // otherwise the other half of the lanes is zero
        const int64_t row = n * w.columns + column, next = both ? row + w.columns : row;
        if (!piece) {
            alignas(64) typename L::Element rows[2][kStrip] = {};
            copy_values<L>(w, row, columns, rows[0]);
            if (both) copy_values<L>(w, next, columns, rows[1]);
            for (int64_t c = 0; c < columns; c += width) {
                L::store(panel + c, _mm512_load_si512(rows[0] + c), _mm512_load_si512(rows[1] + c));
            }
            continue;
        }
        // As below, no processor guesses it. A line is two strips wide: the next one is asked for as well.
        for (int64_t r = n; r < n + L::kPerLane; ++r) {
            ask_for(w.codes + (((r + 32) * w.columns + column) >> 1));
            ask_for<_MM_HINT_T1>(w.codes + ((r * w.columns + column + 2 * kStrip) >> 1));
        }
        for (int64_t c = 0; c < columns; c += piece) {
            const float* scale = scales[c > 0] + (n - first);
            const __m512i table0 = L::table(scaled(w.code, scale[0]));
            const __m512i table1 = both ? L::table(scaled(w.code, scale[1])) : _mm512_setzero_si512();
            for (int64_t i = c; i < c + piece; i += width) {
                const __m512i values0 = L::look_up(table0, w.codes + ((row + i) >> 1));
                const __m512i values1 = L::look_up(table1, w.codes + ((next + i) >> 1));
                L::store(panel + i, values0, values1);
            }
        }
    }
}

// The rows of a dense matrix with values of type S: the first `count` lanes' values from position i of a row on.
template <class L, class S>
struct DenseRows {
    using Lane = L;
    const Dense& m;
    // A strip is a small part of each row: what lies ahead is asked for, since no processor guesses it.
    void prefetch(int64_t row, int64_t i, int64_t count) const {
        for (int64_t c = 0; c < count; c += 64 / S::kSize) {
            ask_for(at(m.values, row * m.stride + i + c, S::kSize));
        }
    }
    __m512i read(int64_t row, int64_t i, int64_t count) const {
        return L::template from<S>(m.values, row * m.stride + i, count);
    }
};

// Those of a weight in bytes.
template <class L>
struct BytesRows {
    using Lane = L;
    const Weight8bit& m;
    void prefetch(int64_t row, int64_t i, int64_t) const { ask_for(m.codes + row * m.columns + i); }
    __m512i read(int64_t row, int64_t i, int64_t count) const {
        const int64_t begin = row * m.columns + i;
        if (m.piece && count > 0) {
            const __m512 scale = _mm512_set1_ps(m.scale(begin));
            const auto values = [&](int64_t from) {
                const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(m.codes + begin + from));
                return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
            };
            return L::round(values(0), [&] { return values(16); });
        }
        alignas(64) float values[16 * L::kPerLane] = {};
        for (int64_t n = 0; n < least(count, 16 * L::kPerLane); ++n) {
            values[n] = static_cast<float>(m.codes[begin + n]) * m.scale(begin + n);
        }
        return L::template from<Fp32>(values, 0, 16 * L::kPerLane);
    }
};

template <class Rows>
void pack_forward(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    using L = typename Rows::Lane;
    constexpr int64_t width = 16 * L::kPerLane;
    alignas(64) __m512i lanes[16];
    for (int64_t c = 0; c < least(kStrip, rows.m.rows - column); c += 16) {
        for (int64_t i = first; i < last; i += width) {
            for (int64_t r = 0; r < 16; ++r) {
                lanes[r] = rows.read(least(column + c + r, rows.m.rows - 1), i, last - i);
            }
            transpose(lanes, sizeof lanes[0], panel + (i - first) / L::kPerLane * kStrip + c);
        }
    }
}

template <class Rows>
void pack_gradient(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    using L = typename Rows::Lane;
    constexpr int64_t width = 16 * L::kPerLane;
    const int64_t columns = least(kStrip, rows.m.columns - column);
    for (int64_t n = first; n < last; n += L::kPerLane, panel += kStrip) {
        const bool both = L::kPerLane == 2 && n + 1 < last;  // otherwise the other half of the lanes is zero
        for (int64_t ahead = n + 16; ahead < n + 16 + L::kPerLane; ++ahead) rows.prefetch(ahead, column, columns);
        for (int64_t c = 0; c < columns; c += width) {
            const __m512i values = rows.read(n, column + c, columns - c);
            const __m512i next = both ? rows.read(n + 1, column + c, columns - c) : _mm512_setzero_si512();
            L::store(panel + c, values, next);
        }
    }
}

#include "factors.inl"

// Where few columns leave registers, the even and the odd lanes are summed apart, so that no sum waits for its last.
template <class L, int rows, int groups>
void multiply_tile(const void* x, int64_t stride, const float* panel, int64_t lanes, float* sums, bool add) {
    constexpr int parts = groups == 1 ? 2 : 1;
    __m512 sum[parts][rows][groups];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < groups; ++c) {
            sum[0][r][c] = add ? _mm512_load_ps(sums + r * kStrip + 16 * c) : _mm512_setzero_ps();
            if (parts == 2) sum[parts - 1][r][c] = _mm512_setzero_ps();
        }
    }
    const auto step = [&](int64_t i, int part) {
        __m512i w[groups];
        for (int c = 0; c < groups; ++c) w[c] = _mm512_load_si512(panel + i * kStrip + 16 * c);
        for (int r = 0; r < rows; ++r) {
            const __m512i lane = _mm512_set1_epi32(load<int32_t>(at(x, r * stride, 1), i));
            for (int c = 0; c < groups; ++c) sum[part][r][c] = L::multiply_add(lane, w[c], sum[part][r][c]);
        }
    };
    int64_t i = 0;
    for (; i + parts <= lanes; i += parts) {
        for (int part = 0; part < parts; ++part) step(i + part, part);
    }
    if (i < lanes) step(i, 0);
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < groups; ++c) {
            const __m512 total = parts == 2 ? _mm512_add_ps(sum[0][r][c], sum[parts - 1][r][c]) : sum[0][r][c];
            _mm512_store_ps(sums + r * kStrip + 16 * c, total);
        }
    }
}

template <class L, int groups>
void multiply_rows(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, float* sums,
                   bool add) {
    switch (rows) {
        case 1: return multiply_tile<L, 1, groups>(x, stride, panel, lanes, sums, add);
        case 2: return multiply_tile<L, 2, groups>(x, stride, panel, lanes, sums, add);
        case 3: return multiply_tile<L, 3, groups>(x, stride, panel, lanes, sums, add);
        case 4: return multiply_tile<L, 4, groups>(x, stride, panel, lanes, sums, add);
        case 5: return multiply_tile<L, 5, groups>(x, stride, panel, lanes, sums, add);
        default: return multiply_tile<L, 6, groups>(x, stride, panel, lanes, sums, add);
    }
}

template <class L>
void multiply(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, int64_t columns,
              float* sums, bool add) {
    switch ((columns + 15) / 16) {
        case 1: return multiply_rows<L, 1>(x, stride, rows, panel, lanes, sums, add);
        case 2: return multiply_rows<L, 2>(x, stride, rows, panel, lanes, sums, add);
        case 3: return multiply_rows<L, 3>(x, stride, rows, panel, lanes, sums, add);
        default: return multiply_rows<L, 4>(x, stride, rows, panel, lanes, sums, add);
    }
}

template <class T>
void widen(const void* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) Fp32::store(out, i, T::load(x, i));
    if (i < n) {
        float rest[16] = {};
        std::memcpy(rest, at(x, i, T::kSize), static_cast<size_t>((n - i) * T::kSize));
        Fp32::store(out, i, T::load(rest, 0));
    }
}

template <class T>
void finish(const float* sums, const float* bias, int64_t n, void* y) {
    const int64_t whole = n / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        T::store(y, i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(bias + i)));
    }
    if (whole < n) {
        float rest[16];
        T::store(rest, 0, _mm512_add_ps(_mm512_load_ps(sums + whole), _mm512_load_ps(bias + whole)));
        std::memcpy(at(y, whole, T::kSize), rest, static_cast<size_t>((n - whole) * T::kSize));
    }
}

template <class L, class T, const FewKernels& few>
const MatmulKernels kernels = {
    L::kPerLane == 2,
    6,
    &few,
    expand_forward<L>,
    expand_gradient<L>,
    dense_forward<L>,
    dense_gradient<L>,
    bytes_forward<L>,
    bytes_gradient<L>,
    multiply<L>,
    widen<T>,
    finish<T>,
};

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const MatmulKernels* avx512_matmul(Type type) {
    switch (type) {
        case Type::fp16: return &kernels<Singles<Fp16>, Fp16, avx512_few_fp16>;
        case Type::bf16:
            if (__builtin_cpu_supports("avx512bf16")) return &kernels<Pairs, Bf16OfUnit, avx512_few_pairs>;
            return &kernels<Singles<Bf16>, Bf16, avx512_few_bf16>;
        default: return &kernels<Singles<Fp32>, Fp32, avx512_few_fp32>;
    }
}

}  // namespace halfbyte

#endif

// The AVX-512 tier's products: bf16 in pairs by VDPBF16PS where the chip has it (AVX512_BF16), everything else in fp32.
//
// Sixteen lanes at a time. A block of W has only sixteen different values: they are made once per block, scaled and
// rounded, and looked up. A panel is kLanes rows of kStrip lanes; six rows of x by a strip keep 24 sums in registers, so
// that ten loads feed 24 multiplications.
//
// The whole file is compiled with AVX512_BF16, since its intrinsics need it and a compiler uses it for nothing else.

#if defined(__x86_64__)

#include "avx512.h"
#include "matmul.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace halfbyte {
namespace {

// Lanes of two bf16 values.
struct Pairs {
    using Element = uint16_t;
    static constexpr int kPerLane = 2;

    // The sixteen values of a block, twice, since a lookup reads five bits.
    static __m512i table(__m512 values) { return (__m512i)_mm512_cvtne2ps_pbh(values, values); }

    // 32 values from sixteen bytes.
    static __m512i look_up(__m512i table, const uint8_t* codes) {
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m512i spread = _mm512_set_epi64(  // a byte to each word, twice
            0x800f800f800e800e, 0x800d800d800c800c, 0x800b800b800a800a, 0x8009800980088008,
            0x8007800780068006, 0x8005800580048004, 0x8003800380028002, 0x8001800180008000);
        const __m512i words = _mm512_shuffle_epi8(bytes, spread);
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_set1_epi32(4)), table);
    }

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
    }
};

// Lanes of one fp32 value, W rounded to the type T.
template <class T>
struct Singles {
    using Element = float;
    static constexpr int kPerLane = 1;

    static __m512i table(__m512 values) {
        alignas(64) float rounded[16];
        T::store(rounded, 0, values);
        return _mm512_castps_si512(T::load(rounded, 0));
    }

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

    static __m512 multiply_add(__m512i x, __m512i w, __m512 sum) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
    }
};

// The `count` values of W from position `first` of the flattened weight on, padded with zeros to a multiple of sixteen
// lanes.
template <class L>
void expand_row(const Weight4bit& w, int64_t first, int64_t count, typename L::Element* out) {
    constexpr int64_t width = 16 * L::kPerLane;
    const __m512 code = _mm512_loadu_ps(w.code);
    const int64_t end = first + count;
    int64_t block = w.blocksize.quotient(first);
    for (int64_t i = first; i < end; ++block) {
        const __m512i table = L::table(_mm512_mul_ps(code, _mm512_set1_ps(w.scale(block))));
        const int64_t stop = least((block + 1) * w.blocksize.value(), end);
        if (w.aligned) {
            for (; i < stop; i += width) _mm512_storeu_si512(out + (i - first), L::look_up(table, w.codes + i / 2));
        } else {
            alignas(64) typename L::Element values[width];
            _mm512_store_si512(values, table);
            for (; i < stop; ++i) out[i - first] = values[code_at(w.codes, i)];
        }
    }
    for (; count % width; ++count) out[count] = 0;
}

// Sixteen rows of sixteen lanes, `stride` lanes apart, to columns of a panel.
void transpose(const uint32_t* in, int64_t stride, float* panel) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(in + i * stride);
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

template <class L>
void expand_forward(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    constexpr int64_t lanes = 128, values = lanes * L::kPerLane;
    alignas(64) typename L::Element rows[16][values];
    for (int64_t c = 0; c < kStrip; c += 16) {
        for (int64_t begin = first; begin < last; begin += values) {
            const int64_t count = least(values, last - begin);
            for (int64_t r = 0; r < 16; ++r) {
                const int64_t n = column + c + r;
                if (n < w.rows) {
                    expand_row<L>(w, n * w.columns + begin, count, rows[r]);
                } else {
                    std::memset(rows[r], 0, sizeof rows[r]);
                }
            }
            float* out = panel + (begin - first) / L::kPerLane * kStrip + c;
            for (int64_t i = 0; i < count; i += 16 * L::kPerLane) {
                transpose(reinterpret_cast<const uint32_t*>(&rows[0][i]), lanes, out + i / L::kPerLane * kStrip);
            }
        }
    }
}

template <class T>
void expand_gradient(Singles<T>, const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t count = least(kStrip, w.columns - column);
    if (count < kStrip) std::memset(panel, 0, static_cast<size_t>((last - first) * kStrip) * sizeof(float));
    for (int64_t n = first; n < last; ++n, panel += kStrip) {
        expand_row<Singles<T>>(w, n * w.columns + column, count, panel);
    }
}

void expand_gradient(Pairs, const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t count = least(kStrip, w.columns - column);
    alignas(64) uint16_t rows[2][kStrip] = {};
    const __m512i step = _mm512_set1_epi32(0x00010001);
    const __m512i low = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008,
                                         0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
    const __m512i high = _mm512_add_epi16(low, _mm512_slli_epi16(step, 4));
    for (int64_t n = first; n < last; n += 2, panel += kStrip) {
        expand_row<Pairs>(w, n * w.columns + column, count, rows[0]);
        if (n + 1 < last) {
            expand_row<Pairs>(w, (n + 1) * w.columns + column, count, rows[1]);
        } else {
            std::memset(rows[1], 0, sizeof rows[1]);
        }
        for (int64_t half = 0; half < 2; ++half) {
            const __m512i even = _mm512_load_si512(rows[0] + 32 * half), odd = _mm512_load_si512(rows[1] + 32 * half);
            _mm512_store_si512(panel + 32 * half, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(panel + 32 * half + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

template <class L>
void expand_gradient(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    expand_gradient(L(), w, column, first, last, panel);
}

template <class L, int rows>
void multiply_tile(const void* x, int64_t stride, const float* panel, int64_t lanes, float* sums, bool add) {
    __m512 sum[rows][4];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 4; ++c) {
            sum[r][c] = add ? _mm512_load_ps(sums + r * kStrip + 16 * c) : _mm512_setzero_ps();
        }
    }
    for (int64_t i = 0; i < lanes; ++i) {
        __m512i w[4];
        for (int c = 0; c < 4; ++c) w[c] = _mm512_load_si512(panel + i * kStrip + 16 * c);
        for (int r = 0; r < rows; ++r) {
            const __m512i lane = _mm512_set1_epi32(load<int32_t>(at(x, r * stride, 1), i));
            for (int c = 0; c < 4; ++c) sum[r][c] = L::multiply_add(lane, w[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 4; ++c) _mm512_store_ps(sums + r * kStrip + 16 * c, sum[r][c]);
    }
}

template <class L>
void multiply(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, float* sums, bool add) {
    switch (rows) {
        case 1: return multiply_tile<L, 1>(x, stride, panel, lanes, sums, add);
        case 2: return multiply_tile<L, 2>(x, stride, panel, lanes, sums, add);
        case 3: return multiply_tile<L, 3>(x, stride, panel, lanes, sums, add);
        case 4: return multiply_tile<L, 4>(x, stride, panel, lanes, sums, add);
        case 5: return multiply_tile<L, 5>(x, stride, panel, lanes, sums, add);
        default: return multiply_tile<L, 6>(x, stride, panel, lanes, sums, add);
    }
}

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

// Four rows of W, `width` lanes apart, times some of x.
template <class L, int rows>
void dot_tile(const typename L::Element* w, int64_t width, int64_t lanes, const void* x, int64_t stride, float* sums,
              bool add) {
    __m512 sum[rows][4];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < lanes; i += 16) {
        __m512i from_w[4];
        for (int c = 0; c < 4; ++c) from_w[c] = _mm512_load_si512(w + (c * width + i) * L::kPerLane);
        for (int r = 0; r < rows; ++r) {
            const __m512i from_x = _mm512_loadu_si512(at(x, r * stride + 4 * i, 1));
            for (int c = 0; c < 4; ++c) sum[r][c] = L::multiply_add(from_x, from_w[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        const __m128 total = totals(sum[r]);
        float* out = sums + r * kStrip;
        _mm_store_ps(out, add ? _mm_add_ps(_mm_load_ps(out), total) : total);
    }
}

template <class L>
void dot(const Weight4bit& w, int64_t column, int64_t columns, int64_t first, int64_t last, const void* x,
         int64_t stride, int64_t rows, float* sums, bool add) {
    alignas(64) typename L::Element expanded[4][kLanes * L::kPerLane];
    const int64_t lanes = (last - first + L::kPerLane - 1) / L::kPerLane;
    for (int64_t c = 0; c < columns; c += 4) {
        for (int64_t i = 0; i < 4; ++i) {  // the last row again where there are no four
            expand_row<L>(w, (column + least(c + i, columns - 1)) * w.columns + first, last - first, expanded[i]);
        }
        for (int64_t r = 0; r < rows; r += 4) {
            const char* from = at(x, r * stride, 1);
            float* out = sums + r * kStrip + c;
            switch (least(rows - r, 4)) {
                case 1: dot_tile<L, 1>(expanded[0], kLanes, lanes, from, stride, out, add); break;
                case 2: dot_tile<L, 2>(expanded[0], kLanes, lanes, from, stride, out, add); break;
                case 3: dot_tile<L, 3>(expanded[0], kLanes, lanes, from, stride, out, add); break;
                default: dot_tile<L, 4>(expanded[0], kLanes, lanes, from, stride, out, add); break;
            }
        }
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
    float partial[kStrip];
    void* out = n < kStrip ? partial : y;
    for (int64_t i = 0; i < kStrip; i += 16) {
        T::store(out, i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(bias + i)));
    }
    if (n < kStrip) std::memcpy(y, partial, static_cast<size_t>(n * T::kSize));
}

template <class L, class T>
const MatmulKernels kernels = {
    L::kPerLane == 2, 16, expand_forward<L>, expand_gradient<L>, multiply<L>, dot<L>, widen<T>, finish<T>,
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
        case Type::fp16: return &kernels<Singles<Fp16>, Fp16>;
        case Type::bf16:
            if (__builtin_cpu_supports("avx512bf16")) return &kernels<Pairs, Bf16>;
            return &kernels<Singles<Bf16>, Bf16>;
        default: return &kernels<Singles<Fp32>, Fp32>;
    }
}

}  // namespace halfbyte

#endif

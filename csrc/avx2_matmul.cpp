// The AVX2 tier's products (with FMA and F16C), in fp32 for every type.
//
// Eight lanes at a time. A block of W has only sixteen different values: they are made once per block, scaled and
// rounded, and looked up in two registers of eight. A panel is kStrip / 16 parts, one after the other, of rows of
// sixteen lanes; six rows of x by one part keep twelve sums in registers.

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

constexpr int64_t kPart = 16;

// Where the next part of a panel of so many lanes begins.
int64_t part_size(int64_t lanes) { return (lanes + 7) / 8 * 8 * kPart; }

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

// The `count` values of W from position `first` of the flattened weight on, padded with zeros to a multiple of eight.
template <class T>
void expand_row(const Weight4bit& w, int64_t first, int64_t count, float* out) {
    const int64_t blocksize = w.blocksize.value(), end = first + count;
    int64_t stop = (w.blocksize.quotient(first) + 1) * blocksize;
    for (int64_t i = first; i < end; stop += blocksize) {
        float scale;
        read_scales(w, i, 0, 1, &scale);
        const Table<T> table(w.code, scale);
        stop = least(stop, end);
        if (w.piece) {
            for (; i < stop; i += 8, out += 8) _mm256_storeu_ps(out, table.look_up(w.codes + (i >> 1)));
        } else {
            float values[16];
            _mm256_storeu_ps(values, table.low);
            _mm256_storeu_ps(values + 8, table.high);
            for (; i < stop; ++i) *out++ = values[code_at(w.codes, i)];
        }
    }
    for (; count % 8; ++count) *out++ = 0;
}

// Eight rows of eight lanes, `stride` lanes apart, to columns of a part of a panel.
void transpose(const float* in, int64_t stride, float* panel) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_load_ps(in + i * stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    }
    // a[4 i + j]: of rows 4 i .. 4 i + 3 the lanes j and j + 4
    for (int j = 0; j < 4; ++j) {
        _mm256_store_ps(panel + j * kPart, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
        _mm256_store_ps(panel + (j + 4) * kPart, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
}

template <class T>
void expand_forward(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    constexpr int64_t lanes = 128;
    alignas(64) float rows[8][lanes];
    for (int64_t c = 0; c < kStrip; c += 8) {
        for (int64_t begin = first; begin < last; begin += lanes) {
            const int64_t count = least(lanes, last - begin);
            for (int64_t r = 0; r < 8; ++r) {
                const int64_t n = column + c + r;
                if (n < w.rows) {
                    expand_row<T>(w, n * w.columns + begin, count, rows[r]);
                } else {
                    std::memset(rows[r], 0, sizeof rows[r]);
                }
            }
            float* out = panel + c / kPart * part_size(last - first) + (begin - first) * kPart + c % kPart;
            for (int64_t i = 0; i < count; i += 8) transpose(&rows[0][i], lanes, out + i * kPart);
        }
    }
}

template <class T>
void expand_gradient(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t count = least(kStrip, w.columns - column);
    alignas(64) float row[kStrip] = {};
    for (int64_t n = first; n < last; ++n, panel += kPart) {
        expand_row<T>(w, n * w.columns + column, count, row);
        for (int64_t c = 0; c < kStrip; c += 8) {
            _mm256_store_ps(panel + c / kPart * part_size(last - first) + c % kPart, _mm256_load_ps(row + c));
        }
    }
}

// The first `count` of eight values of type S, rounded to T, and zeros.
template <class T, class S>
__m256 values_of(const void* x, int64_t i, int64_t count) {
    if (count >= 8) return T::nearest(S::load(x, i));
    float rest[8] = {};
    if (count > 0) std::memcpy(rest, at(x, i * S::kSize), static_cast<size_t>(count * S::kSize));
    return T::nearest(S::load(rest, 0));
}

template <class T, class S>
void pack_forward(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    alignas(64) float rows[8][8];
    for (int64_t c = 0; c < least(kStrip, m.rows - column); c += 8) {
        float* const out = panel + c / kPart * part_size(last - first) + c % kPart;
        for (int64_t i = first; i < last; i += 8) {
            for (int64_t r = 0; r < 8; ++r) {
                const int64_t row = least(column + c + r, m.rows - 1);
                _mm256_store_ps(rows[r], values_of<T, S>(m.values, row * m.stride + i, last - i));
            }
            transpose(rows[0], 8, out + (i - first) * kPart);
        }
    }
}

template <class T, class S>
void pack_gradient(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t columns = least(kStrip, m.columns - column);
    for (int64_t n = first; n < last; ++n, panel += kPart) {
        for (int64_t c = 0; c < columns; c += 8) {
            const __m256 values = values_of<T, S>(m.values, n * m.stride + column + c, columns - c);
            _mm256_store_ps(panel + c / kPart * part_size(last - first) + c % kPart, values);
        }
    }
}

template <class T>
void dense_forward(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    switch (m.type) {
        case Type::bf16: return pack_forward<T, Bf16>(m, column, first, last, panel);
        case Type::fp16: return pack_forward<T, Fp16>(m, column, first, last, panel);
        default: return pack_forward<T, Fp32>(m, column, first, last, panel);
    }
}

template <class T>
void dense_gradient(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    switch (m.type) {
        case Type::bf16: return pack_gradient<T, Bf16>(m, column, first, last, panel);
        case Type::fp16: return pack_gradient<T, Fp16>(m, column, first, last, panel);
        default: return pack_gradient<T, Fp32>(m, column, first, last, panel);
    }
}

template <int rows>
void multiply_tile(const void* x, int64_t stride, const float* part, int64_t lanes, float* sums, bool add) {
    __m256 sum[rows][2];
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 2; ++c) {
            sum[r][c] = add ? _mm256_load_ps(sums + r * kStrip + 8 * c) : _mm256_setzero_ps();
        }
    }
    for (int64_t i = 0; i < lanes; ++i) {
        const __m256 w0 = _mm256_load_ps(part + i * kPart), w1 = _mm256_load_ps(part + i * kPart + 8);
        for (int r = 0; r < rows; ++r) {
            const __m256 lane = _mm256_set1_ps(load<float>(at(x, r * stride), i));
            sum[r][0] = _mm256_fmadd_ps(lane, w0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(lane, w1, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 2; ++c) _mm256_store_ps(sums + r * kStrip + 8 * c, sum[r][c]);
    }
}

void multiply(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, int64_t columns,
              float* sums, bool add) {
    for (int64_t c = 0; c < columns; c += kPart, panel += part_size(lanes), sums += kPart) {
        switch (rows) {
            case 1: multiply_tile<1>(x, stride, panel, lanes, sums, add); break;
            case 2: multiply_tile<2>(x, stride, panel, lanes, sums, add); break;
            case 3: multiply_tile<3>(x, stride, panel, lanes, sums, add); break;
            case 4: multiply_tile<4>(x, stride, panel, lanes, sums, add); break;
            case 5: multiply_tile<5>(x, stride, panel, lanes, sums, add); break;
            default: multiply_tile<6>(x, stride, panel, lanes, sums, add); break;
        }
    }
}

float total(__m256 a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Two rows of W, from the positions `first` on, times `rows` of x.
template <class T, int rows>
void dot_tile(const Weight4bit& w, const int64_t* first, const void* x, float* sums) {
    constexpr int64_t stretch = 2048;  // values whose scales are read at once
    const int64_t depth = w.columns, piece = least(w.piece, stretch);
    const uint8_t *codes0 = w.codes + first[0] / 2, *codes1 = w.codes + first[1] / 2;
    __m256 sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (int64_t begin = 0; begin < depth; begin += stretch) {
        const int64_t end = least(begin + stretch, depth);
        float scales[2][stretch / 32];
        for (int c = 0; c < 2; ++c) read_scales(w, first[c] + begin, piece, (end - begin) / piece, scales[c]);
        for (int64_t i = begin, k = 0; i < end; i += piece, ++k) {
            const Table<T> table0(w.code, scales[0][k]), table1(w.code, scales[1][k]);
            _mm_prefetch(reinterpret_cast<const char*>(codes0 + ((i + 2 * depth) >> 1)), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(codes1 + ((i + 2 * depth) >> 1)), _MM_HINT_T0);
            for (int64_t j = i; j < i + piece; j += 8) {
                const __m256 from_w0 = table0.look_up(codes0 + (j >> 1)), from_w1 = table1.look_up(codes1 + (j >> 1));
                for (int r = 0; r < rows; ++r) {
                    const __m256 from_x = T::load(x, r * depth + j);
                    sum[r][0] = _mm256_fmadd_ps(from_x, from_w0, sum[r][0]);
                    sum[r][1] = _mm256_fmadd_ps(from_x, from_w1, sum[r][1]);
                }
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 2; ++c) sums[r * kStrip + c] = total(sum[r][c]);
    }
}

template <class T>
void dot(const Weight4bit& w, int64_t column, int64_t columns, const void* x, int64_t rows, float* sums) {
    for (int64_t c = 0; c < columns; c += 2) {
        const int64_t n = column + c;  // the last row again where there are no two
        const int64_t first[2] = {n * w.columns, (column + least(c + 1, columns - 1)) * w.columns};
        for (int64_t r = 0; r < rows; r += 4) {
            const void* from = at(x, r * w.columns * T::kSize);
            float* out = sums + r * kStrip + c;
            switch (least(rows - r, 4)) {
                case 1: dot_tile<T, 1>(w, first, from, out); break;
                case 2: dot_tile<T, 2>(w, first, from, out); break;
                case 3: dot_tile<T, 3>(w, first, from, out); break;
                default: dot_tile<T, 4>(w, first, from, out); break;
            }
        }
    }
}

template <class T>
void widen(const void* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) Fp32::store(out, i, T::load(x, i));
    if (i < n) {
        float rest[8] = {};
        std::memcpy(rest, at(x, i * T::kSize), static_cast<size_t>((n - i) * T::kSize));
        Fp32::store(out, i, T::load(rest, 0));
    }
}

template <class T>
void finish(const float* sums, const float* bias, int64_t n, void* y) {
    float partial[kStrip];
    void* out = n < kStrip ? partial : y;
    for (int64_t i = 0; i < kStrip; i += 8) {
        T::store(out, i, _mm256_add_ps(_mm256_load_ps(sums + i), _mm256_load_ps(bias + i)));
    }
    if (n < kStrip) std::memcpy(y, partial, static_cast<size_t>(n * T::kSize));
}

template <class T>
const MatmulKernels kernels = {
    false,    6,      8,        expand_forward<T>, expand_gradient<T>, dense_forward<T>, dense_gradient<T>,
    multiply, dot<T>, widen<T>, finish<T>,
};

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const MatmulKernels* avx2_matmul(Type type) {
    switch (type) {
        case Type::bf16: return &kernels<Bf16>;
        case Type::fp16: return &kernels<Fp16>;
        default: return &kernels<Fp32>;
    }
}

}  // namespace halfbyte

#endif

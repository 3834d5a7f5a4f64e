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

// The rows of a dense matrix with values of type S: the first `count` of eight values from position i of a row on,
// rounded to T, and zeros.
template <class T, class S>
struct DenseRows {
    const Dense& m;
    __m256 read(int64_t row, int64_t i, int64_t count) const {
        const int64_t begin = row * m.stride + i;
        if (count >= 8) return T::nearest(S::load(m.values, begin));
        float rest[8] = {};
        std::memcpy(rest, at(m.values, begin * S::kSize), static_cast<size_t>(count * S::kSize));
        return T::nearest(S::load(rest, 0));
    }
};

// Those of a weight in bytes.
template <class T>
struct BytesRows {
    const Weight8bit& m;
    __m256 read(int64_t row, int64_t i, int64_t count) const {
        const int64_t begin = row * m.columns + i;
        if (m.piece) {
            const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(at(m.codes, begin)));
            return T::nearest(_mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(m.scale(begin))));
        }
        float values[8] = {};
        for (int64_t n = 0; n < least(count, 8); ++n) {
            values[n] = static_cast<float>(m.codes[begin + n]) * m.scale(begin + n);
        }
        return T::nearest(_mm256_loadu_ps(values));
    }
};

template <class Rows>
void pack_forward(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    alignas(64) float lanes[8][8];
    for (int64_t c = 0; c < least(kStrip, rows.m.rows - column); c += 8) {
        float* const out = panel + c / kPart * part_size(last - first) + c % kPart;
        for (int64_t i = first; i < last; i += 8) {
            for (int64_t r = 0; r < 8; ++r) {
                _mm256_store_ps(lanes[r], rows.read(least(column + c + r, rows.m.rows - 1), i, last - i));
            }
            transpose(lanes[0], 8, out + (i - first) * kPart);
        }
    }
}

template <class Rows>
void pack_gradient(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t columns = least(kStrip, rows.m.columns - column);
    for (int64_t n = first; n < last; ++n, panel += kPart) {
        for (int64_t c = 0; c < columns; c += 8) {
            _mm256_store_ps(panel + c / kPart * part_size(last - first) + c % kPart,
                            rows.read(n, column + c, columns - c));
        }
    }
}

#include "factors.inl"

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
    const int64_t whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        T::store(y, i, _mm256_add_ps(_mm256_load_ps(sums + i), _mm256_load_ps(bias + i)));
    }
    if (whole < n) {
        float rest[8];
        T::store(rest, 0, _mm256_add_ps(_mm256_load_ps(sums + whole), _mm256_load_ps(bias + whole)));
        std::memcpy(at(y, whole * T::kSize), rest, static_cast<size_t>((n - whole) * T::kSize));
    }
}

template <class T, const FewKernels& few>
const MatmulKernels kernels = {
    false,
    6,
    &few,
    expand_forward<T>,
    expand_gradient<T>,
    dense_forward<T>,
    dense_gradient<T>,
    bytes_forward<T>,
    bytes_gradient<T>,
    multiply,
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

const MatmulKernels* avx2_matmul(Type type) {
    switch (type) {
        case Type::bf16: return &kernels<Bf16, avx2_few_bf16>;
        case Type::fp16: return &kernels<Fp16, avx2_few_fp16>;
        default: return &kernels<Fp32, avx2_few_fp32>;
    }
}

}  // namespace halfbyte

#endif

// The NEON tier's products, in fp32 for every type.
//
// Four lanes at a time. A block of W has only sixteen different values: they are made once per block, scaled and
// rounded, and looked up byte by byte. A panel is kStrip / 16 parts, one after the other, of rows of sixteen lanes;
// six rows of x by one part keep 24 sums in registers. Left out: BFDOT and BFMMLA, which newer processors have
// for bf16, since none was at hand to measure them on.

#if defined(__aarch64__)

#include "matmul.h"
#include "neon.h"

namespace halfbyte {
namespace {

constexpr int64_t kPart = 16;

// Where the next part of a panel of so many lanes begins.
int64_t part_size(int64_t lanes) { return (lanes + 3) / 4 * 4 * kPart; }

// Where column c of a panel of so many lanes begins.
float* column_of(float* panel, int64_t lanes, int64_t c) { return panel + c / kPart * part_size(lanes) + c % kPart; }

// The `count` values of W from position `first` of the flattened weight on, padded with zeros to a multiple of four.
template <class T>
void expand_row(const Weight4bit& w, int64_t first, int64_t count, float* out) {
    const int64_t blocksize = w.blocksize.value(), end = first + count;
    int64_t stop = (w.blocksize.quotient(first) + 1) * blocksize;
    for (int64_t i = first; i < end; stop += blocksize) {
        float scale;
        read_scales(w, i, 0, 1, &scale);
        stop = least(stop, end);
        if (w.piece) {
            const Table<T> table(w.code, scale);
            for (; i < stop; i += 16, out += 16) {
                const float32x4x4_t values = table.look_up(unpack(w.codes + (i >> 1)));
                for (int k = 0; k < 4; ++k) store4(out + 4 * k, values.val[k]);
            }
        } else {
            float values[16];
            for (int k = 0; k < 16; k += 4) store4(values + k, T::nearest(vmulq_n_f32(load4(w.code + k), scale)));
            for (; i < stop; ++i) *out++ = values[code_at(w.codes, i)];
        }
    }
    for (; count % 4; ++count) *out++ = 0;
}

// Four rows of four lanes to columns of a part of a panel.
void transpose(const float32x4_t* row, float* panel) {
    const float32x4x2_t a = vtrnq_f32(row[0], row[1]), b = vtrnq_f32(row[2], row[3]);
    store4(panel, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
    store4(panel + kPart, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
    store4(panel + 2 * kPart, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
    store4(panel + 3 * kPart, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
}

// Columns beyond the last are the last again.
template <class T>
void expand_forward(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    constexpr int64_t lanes = 128;
    float rows[4][lanes];
    for (int64_t c = 0; c < kStrip; c += 4) {
        float* const out = column_of(panel, last - first, c);
        for (int64_t begin = first; begin < last; begin += lanes) {
            const int64_t count = least(lanes, last - begin);
            for (int64_t r = 0; r < 4; ++r) {
                expand_row<T>(w, least(column + c + r, w.rows - 1) * w.columns + begin, count, rows[r]);
            }
            for (int64_t i = 0; i < count; i += 4) {
                const float32x4_t four[4] = {load4(rows[0] + i), load4(rows[1] + i), load4(rows[2] + i),
                                             load4(rows[3] + i)};
                transpose(four, out + (begin - first + i) * kPart);
            }
        }
    }
}

template <class T>
void expand_gradient(const Weight4bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t count = least(kStrip, w.columns - column);
    float row[kStrip] = {};
    for (int64_t n = first; n < last; ++n, panel += kPart) {
        expand_row<T>(w, n * w.columns + column, count, row);
        for (int64_t c = 0; c < kStrip; c += 4) store4(column_of(panel, last - first, c), load4(row + c));
    }
}

// The first `count` of four values of type S, rounded to T, and zeros.
template <class T, class S>
float32x4_t values_of(const void* x, int64_t i, int64_t count) {
    if (count >= 4) return T::nearest(S::load(x, i));
    float rest[4] = {};
    if (count > 0) std::memcpy(rest, at(x, i * S::kSize), static_cast<size_t>(count * S::kSize));
    return T::nearest(S::load(rest, 0));
}

// The rows of a dense matrix with values of type S: the first `count` of four values from position i of a row on,
// rounded to T, and zeros.
template <class T, class S>
struct DenseRows {
    const Dense& m;
    float32x4_t read(int64_t row, int64_t i, int64_t count) const {
        return values_of<T, S>(m.values, row * m.stride + i, count);
    }
};

// Those of a weight in bytes.
template <class T>
struct BytesRows {
    const Weight8bit& m;
    float32x4_t read(int64_t row, int64_t i, int64_t count) const {
        const int64_t begin = row * m.columns + i;
        float values[4] = {};
        for (int64_t n = 0; n < least(count, 4); ++n) values[n] = static_cast<float>(m.codes[begin + n]);
        if (m.piece) return T::nearest(vmulq_n_f32(load4(values), m.scale(begin)));
        for (int64_t n = 0; n < least(count, 4); ++n) values[n] *= m.scale(begin + n);
        return T::nearest(load4(values));
    }
};

template <class Rows>
void pack_forward(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    for (int64_t c = 0; c < least(kStrip, rows.m.rows - column); c += 4) {
        float* const out = column_of(panel, last - first, c);
        for (int64_t i = first; i < last; i += 4) {
            float32x4_t four[4];
            for (int64_t r = 0; r < 4; ++r) four[r] = rows.read(least(column + c + r, rows.m.rows - 1), i, last - i);
            transpose(four, out + (i - first) * kPart);
        }
    }
}

template <class Rows>
void pack_gradient(const Rows& rows, int64_t column, int64_t first, int64_t last, float* panel) {
    const int64_t columns = least(kStrip, rows.m.columns - column);
    for (int64_t n = first; n < last; ++n, panel += kPart) {
        for (int64_t c = 0; c < columns; c += 4) {
            store4(column_of(panel, last - first, c), rows.read(n, column + c, columns - c));
        }
    }
}

#include "factors.inl"

template <int rows>
void multiply_tile(const void* x, int64_t stride, const float* part, int64_t lanes, float* sums, bool add) {
    float32x4_t sum[rows][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) sum[r][c] = add ? load4(sums + r * kStrip + 4 * c) : vdupq_n_f32(0);
    }
    for (int64_t i = 0; i < lanes; ++i) {
        float32x4_t w[4];
        for (int c = 0; c < 4; ++c) w[c] = load4(part + i * kPart + 4 * c);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const float lane = load<float>(at(x, r * stride), i);
            for (int c = 0; c < 4; ++c) sum[r][c] = vfmaq_n_f32(sum[r][c], w[c], lane);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) store4(sums + r * kStrip + 4 * c, sum[r][c]);
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

// What makes values of a piece with one scale, sixteen at a time from position i of W on.
template <class T>
struct LookedUp {
    using Weight = Weight4bit;
    Table<T> table;

    LookedUp(const Weight4bit& w, float scale) : table(w.code, scale) {}
    float32x4x4_t values(const Weight4bit& w, int64_t i) const { return table.look_up(unpack(w.codes + i / 2)); }
};

template <class T>
struct Converted {
    using Weight = Weight8bit;
    float scale;

    Converted(const Weight8bit&, float scale) : scale(scale) {}
    float32x4x4_t values(const Weight8bit& w, int64_t i) const {
        const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(at(w.codes, i)));
        const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
        return {{value(vget_low_s16(low)), value(vget_high_s16(low)), value(vget_low_s16(high)),
                 value(vget_high_s16(high))}};
    }

  private:
    float32x4_t value(int16x4_t codes) const { return T::nearest(vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(codes)), scale)); }
};

// Dense values of the type T, whose rows lie without gaps.
template <class T>
struct Loaded {
    using Weight = Dense;

    Loaded(const Dense&, float) {}
    float32x4x4_t values(const Dense& w, int64_t i) const {
        return {{T::load(w.values, i), T::load(w.values, i + 4), T::load(w.values, i + 8), T::load(w.values, i + 12)}};
    }
};

template <class Weight>
int64_t piece_of(const Weight& w) {
    return w.piece;
}
int64_t piece_of(const Dense&) { return 32; }

inline void read_scales(const Dense&, int64_t, int64_t, int64_t, float*) {}

// Two rows of W, from the positions `first` on, times `rows` of x.
template <class T, class L, int rows>
void dot_tile(const typename L::Weight& w, const int64_t* first, const void* x, float* sums) {
    constexpr int64_t stretch = 2048;  // values whose scales are read at once
    const int64_t depth = w.columns, piece = least(piece_of(w), stretch);
    float32x4_t sum[rows][2][2];  // of each product the even and the odd vectors, since a sum is slow to follow another
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 2; ++c) sum[r][c][0] = sum[r][c][1] = vdupq_n_f32(0);
    }
    for (int64_t begin = 0; begin < depth; begin += stretch) {
        const int64_t end = least(begin + stretch, depth);
        float scales[2][stretch / 32] = {};
        for (int c = 0; c < 2; ++c) read_scales(w, first[c] + begin, piece, (end - begin) / piece, scales[c]);
        for (int64_t i = begin, k = 0; i < end; i += piece, ++k) {
            const L one(w, scales[0][k]), other(w, scales[1][k]);
            for (int64_t j = i; j < i + piece; j += 16) {
                const float32x4x4_t from_w0 = one.values(w, first[0] + j), from_w1 = other.values(w, first[1] + j);
                for (int r = 0; r < rows; ++r) {
                    for (int v = 0; v < 4; ++v) {
                        const float32x4_t from_x = T::load(x, r * depth + j + 4 * v);
                        sum[r][0][v % 2] = vfmaq_f32(sum[r][0][v % 2], from_x, from_w0.val[v]);
                        sum[r][1][v % 2] = vfmaq_f32(sum[r][1][v % 2], from_x, from_w1.val[v]);
                    }
                }
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < 2; ++c) sums[r * kStrip + c] = vaddvq_f32(vaddq_f32(sum[r][c][0], sum[r][c][1]));
    }
}

// Values are made in their order, so that rows of x stay as they are.
template <class T>
void arrange(const void* x, int64_t rows, int64_t depth, void* arranged) {
    std::memcpy(arranged, x, static_cast<size_t>(rows * depth * T::kSize));
}

template <class T, class L>
void dot(const typename L::Weight& w, int64_t column, int64_t columns, const void* x, int64_t rows, float* sums) {
    for (int64_t c = 0; c < columns; c += 2) {
        const int64_t n = column + c;  // the last row again where there are no two
        const int64_t first[2] = {n * w.columns, (column + least(c + 1, columns - 1)) * w.columns};
        for (int64_t r = 0; r < rows; r += 4) {
            const void* from = at(x, r * w.columns * T::kSize);
            float* out = sums + r * kStrip + c;
            switch (least(rows - r, 4)) {
                case 1: dot_tile<T, L, 1>(w, first, from, out); break;
                case 2: dot_tile<T, L, 2>(w, first, from, out); break;
                case 3: dot_tile<T, L, 3>(w, first, from, out); break;
                default: dot_tile<T, L, 4>(w, first, from, out); break;
            }
        }
    }
}

template <class T>
void widen(const void* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) store4(out + i, T::load(x, i));
    if (i < n) store4(out + i, values_of<Fp32, T>(x, i, n - i));
}

template <class T>
void finish(const float* sums, const float* bias, int64_t n, void* y) {
    float partial[kStrip];
    void* out = n < kStrip ? partial : y;
    for (int64_t i = 0; i < kStrip; i += 4) T::store(out, i, vaddq_f32(load4(sums + i), load4(bias + i)));
    if (n < kStrip) std::memcpy(y, partial, static_cast<size_t>(n * T::kSize));
}

template <class T>
const FewKernels few = {
    8, T::kSize, false, arrange<T>, dot<T, LookedUp<T>>, arrange<T>, dot<T, Converted<T>>, dot<T, Loaded<T>>};

template <class T>
const MatmulKernels kernels = {
    false,
    6,
    &few<T>,
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

const MatmulKernels* neon_matmul(Type type) {
    switch (type) {
        case Type::bf16: return &kernels<Bf16>;
        case Type::fp16: return &kernels<Fp16>;
        default: return &kernels<Fp32>;
    }
}

}  // namespace halfbyte

#endif

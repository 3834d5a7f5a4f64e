// The pieces of a decoder's step (decode.h) between its products: everything is fp32 but what products read (of the
// storage type T), and what the cache keeps.

// finish_product of `count` lanes of columns from i on, or of as many as are `left`.
template <class T, int count>
void finish_columns(const FinishProduct& a, int64_t i, int64_t left) {
    Lanes y[count];
    for (int k = 0; k < count; ++k) y[k] = read<Fp32>(a.sums, i + k * Lanes::kWidth, left - k * Lanes::kWidth);
    for (int64_t j = 0; j < a.rank; ++j) {
        for (int k = 0; k < count; ++k) {
            const int64_t from = i + k * Lanes::kWidth, n = left - k * Lanes::kWidth;
            y[k] = fma(Lanes(a.u[j]), read<T>(a.b, j * a.width + from, n), y[k]);
        }
    }
    for (int k = 0; k < count; ++k) {
        const int64_t from = i + k * Lanes::kWidth, n = left - k * Lanes::kWidth;
        if (a.rescale) y[k] = y[k] * read<Fp32>(a.rescale, from, n);
        if (a.bias) y[k] = y[k] + read<Fp32>(a.bias, from, n);
        if (a.extra_bias) y[k] = y[k] + read<Fp32>(a.extra_bias, from, n);
        write<Fp32>(a.out, from, y[k], n);
    }
}

// out[i] = rescale[i] (sums[i] + sum_j u[j] b[j, i]) + bias[i] for i in [first, last); b: rank x width values of T.
template <class T>
void finish_product(const FinishProduct& a, int64_t first, int64_t last) {
    constexpr int kAtOnce = 4;  // so that what is read of a row of B is whole lines of memory
    constexpr int64_t kColumns = kAtOnce * Lanes::kWidth;
    for (; first + kColumns <= last; first += kColumns) finish_columns<T, kAtOnce>(a, first, kColumns);
    for (; first < last; first += Lanes::kWidth) finish_columns<T, 1>(a, first, last - first);
}

// y = norm(x), of the storage type T or fp32 (Out), which may be x.
template <class T, class Out>
void norm_row(const DecodeNorm& norm, const float* x, int64_t width, void* y) {
    float mean = 0.0f;
    if (norm.centered) {
        Lanes total;
        for (int64_t i = 0; i < width; i += Lanes::kWidth) total = total + read<Fp32>(x, i, width - i);
        mean = sum(total) / static_cast<float>(width);
    }
    Lanes squares;
    for (int64_t i = 0; i < width; i += Lanes::kWidth) {
        const int64_t left = width - i;
        const Lanes value = read<Fp32>(x, i, left) - Lanes(mean);
        squares = fma(value, value, squares);
    }
    const Lanes scale(1.0f / sqrtf(sum(squares) / static_cast<float>(width) + norm.eps));
    for (int64_t i = 0; i < width; i += Lanes::kWidth) {
        const int64_t left = width - i;
        Lanes value = (read<Fp32>(x, i, left) - Lanes(mean)) * scale;
        if (norm.rounded) value = nearest<T>(value);
        if (norm.weight) value = value * read<Fp32>(norm.weight, i, left);
        write<Out>(y, i, value, left);
    }
}

template <class T>
void norm_to_storage(const DecodeNorm& norm, const float* x, int64_t width, void* y) {
    norm_row<T, T>(norm, x, width, y);
}

template <class T>
void norm_in_place(const DecodeNorm& norm, float* x, int64_t width) {
    norm_row<T, Fp32>(norm, x, width, x);
}

// y = x in T.
template <class T>
void round_row(const float* x, int64_t n, void* y) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) write<T>(y, i, read<Fp32>(x, i, n - i), n - i);
}

// y = factor x of T.
template <class T>
void widen_row(const void* x, int64_t n, float factor, float* y) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) {
        write<Fp32>(y, i, read<T>(x, i, n - i) * Lanes(factor), n - i);
    }
}

inline void add_row(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) {
        write<Fp32>(x, i, read<Fp32>(x, i, n - i) + read<Fp32>(y, i, n - i), n - i);
    }
}

// The first 2 half values of a head, turned (rotary.inl), and all of it times a factor; in place.
inline void turn_head(float* x, const float* cos, const float* sin, int64_t half, int64_t size, float factor) {
    for (int64_t i = 0; i < half; i += Lanes::kWidth) {
        const int64_t left = half - i;
        const Lanes a = read<Fp32>(x, i, left), b = read<Fp32>(x, half + i, left);
        const Lanes cos_a = read<Fp32>(cos, i, left), cos_b = read<Fp32>(cos, half + i, left);
        const Lanes sin_a = read<Fp32>(sin, i, left), sin_b = read<Fp32>(sin, half + i, left);
        write<Fp32>(x, i, a * cos_a - b * sin_a, left);
        write<Fp32>(x, half + i, b * cos_b + a * sin_b, left);
    }
    if (factor == 1.0f) return;
    for (int64_t i = 0; i < size; i += Lanes::kWidth) {
        write<Fp32>(x, i, read<Fp32>(x, i, size - i) * Lanes(factor), size - i);
    }
}

// y = activation(gate) up, in T.
template <class T, class Activation>
void gated_row(const float* gate, const float* up, int64_t n, void* y) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) {
        const Activation activated(read<Fp32>(gate, i, n - i));
        write<T>(y, i, activated.value * read<Fp32>(up, i, n - i), n - i);
    }
}

// Vectors that are summed at once, each for all heads: as many sums as are needed to hide a multiply-add's latency, and
// no more than there are registers.
constexpr int kSumsAtOnce = Lanes::kWidth == 16 ? 4 : 2;
constexpr int64_t kPiece = kSumsAtOnce * Lanes::kWidth;

// z[g][t] = sum_d q[g][d] k[d][t] for positions t of a page, those in [begin, end) among them, `heads` query heads at
// once.
template <class C, int heads>
void page_products(const float* q, int64_t begin, int64_t end, int64_t size, const void* keys, float* z) {
    for (int64_t first = begin / kPiece * kPiece; first < end; first += kPiece) {
        Lanes total[kSumsAtOnce][heads];
        for (int64_t d = 0; d < size; ++d) {
            Lanes query[heads];
            for (int g = 0; g < heads; ++g) query[g] = Lanes(q[g * size + d]);
            for (int v = 0; v < kSumsAtOnce; ++v) {
                const Lanes key = read<C>(keys, d * kPage + first + v * Lanes::kWidth);
                for (int g = 0; g < heads; ++g) total[v][g] = fma(query[g], key, total[v][g]);
            }
        }
        for (int v = 0; v < kSumsAtOnce; ++v) {
            for (int g = 0; g < heads; ++g) write<Fp32>(z, g * kPage + first + v * Lanes::kWidth, total[v][g]);
        }
    }
}

// total[g][d] += sum_t p[g][t] v[t][d] for t in [begin, end).
template <class C, int heads>
void page_sums(const float* p, int64_t begin, int64_t end, int64_t size, const void* values, float* total) {
    int64_t d = 0;
    for (; d + kPiece <= size; d += kPiece) {
        Lanes sums[kSumsAtOnce][heads];
        for (int v = 0; v < kSumsAtOnce; ++v) {
            for (int g = 0; g < heads; ++g) sums[v][g] = read<Fp32>(total, g * size + d + v * Lanes::kWidth);
        }
        for (int64_t t = begin; t < end; ++t) {
            Lanes share[heads];
            for (int g = 0; g < heads; ++g) share[g] = Lanes(p[g * kPage + t]);
            for (int v = 0; v < kSumsAtOnce; ++v) {
                const Lanes value = read<C>(values, t * size + d + v * Lanes::kWidth);
                for (int g = 0; g < heads; ++g) sums[v][g] = fma(share[g], value, sums[v][g]);
            }
        }
        for (int v = 0; v < kSumsAtOnce; ++v) {
            for (int g = 0; g < heads; ++g) write<Fp32>(total, g * size + d + v * Lanes::kWidth, sums[v][g]);
        }
    }
    for (; d < size; d += Lanes::kWidth) {
        const int64_t left = size - d;
        Lanes sums[heads];
        for (int g = 0; g < heads; ++g) sums[g] = read<Fp32>(total, g * size + d, left);
        for (int64_t t = begin; t < end; ++t) {
            const Lanes value = read<C>(values, t * size + d, left);
            for (int g = 0; g < heads; ++g) sums[g] = fma(Lanes(p[g * kPage + t]), value, sums[g]);
        }
        for (int g = 0; g < heads; ++g) write<Fp32>(total, g * size + d, sums[g], left);
    }
}

template <class C>
void attend_pages(const AttendPages& a) {
    alignas(64) float z[kHeadsAtOnce * kPage] = {};
    for (int64_t g = 0; g < a.heads; ++g) {
        a.maximum[g] = -INFINITY;
        a.total[g] = 0.0f;
        for (int64_t d = 0; d < a.size; ++d) a.out[g * a.size + d] = 0.0f;
    }
    for (int64_t first = a.begin / kPage * kPage; first < a.end; first += kPage) {
        const char* const page = static_cast<const char*>(a.pages[first / kPage]);
        const void* const keys = page + a.keys;
        const void* const values = page + a.values;
        const float* const key_scales = reinterpret_cast<const float*>(page + a.key_scales);
        const float* const value_scales = reinterpret_cast<const float*>(page + a.value_scales);
        const int64_t begin = a.begin > first ? a.begin - first : 0;
        const int64_t end = a.end < first + kPage ? a.end - first : kPage;
        for (int64_t h = 0, heads; h < a.heads; h += heads) {
            heads = a.heads - h < kHeadsAtOnce ? a.heads - h : kHeadsAtOnce;
            const float* const q = a.q + h * a.size;
            switch (heads) {
                case 1: page_products<C, 1>(q, begin, end, a.size, keys, z); break;
                case 2: page_products<C, 2>(q, begin, end, a.size, keys, z); break;
                case 3: page_products<C, 3>(q, begin, end, a.size, keys, z); break;
                default: page_products<C, 4>(q, begin, end, a.size, keys, z); break;
            }
            for (int64_t g = 0; g < heads; ++g) {
                float* const row = z + g * kPage;
                for (int64_t t = 0; t < kPage; t += Lanes::kWidth) {
                    Lanes value = read<Fp32>(row, t);
                    if (a.scaled) value = value * read<Fp32>(key_scales, t);
                    if (a.cap != 0.0f) value = tanh(value * Lanes(1.0f / a.cap)) * Lanes(a.cap);
                    write<Fp32>(row, t, value);
                }
                // beyond the positions there may be anything
                for (int64_t t = 0; t < begin; ++t) row[t] = -INFINITY;
                for (int64_t t = end; t < kPage; ++t) row[t] = -INFINITY;
                Lanes most(-INFINITY);
                for (int64_t t = 0; t < kPage; t += Lanes::kWidth) most = max(most, read<Fp32>(row, t));
                float& maximum = a.maximum[h + g];
                const float higher = largest(most) > maximum ? largest(most) : maximum;
                const float shrink = maximum == higher ? 1.0f : expf(maximum - higher);
                Lanes total;
                for (int64_t t = 0; t < kPage; t += Lanes::kWidth) {
                    const Lanes p = exp(read<Fp32>(row, t) - Lanes(higher));
                    total = total + p;
                    write<Fp32>(row, t, p);
                }
                a.total[h + g] = a.total[h + g] * shrink + sum(total);
                maximum = higher;
                float* const out = a.out + (h + g) * a.size;
                if (shrink != 1.0f) {
                    for (int64_t d = 0; d < a.size; d += Lanes::kWidth) {
                        write<Fp32>(out, d, read<Fp32>(out, d, a.size - d) * Lanes(shrink), a.size - d);
                    }
                }
                if (a.scaled) {
                    for (int64_t t = 0; t < kPage; t += Lanes::kWidth) {
                        write<Fp32>(row, t, read<Fp32>(row, t) * read<Fp32>(value_scales, t));
                    }
                }
            }
            float* const out = a.out + h * a.size;
            switch (heads) {
                case 1: page_sums<C, 1>(z, begin, end, a.size, values, out); break;
                case 2: page_sums<C, 2>(z, begin, end, a.size, values, out); break;
                case 3: page_sums<C, 3>(z, begin, end, a.size, values, out); break;
                default: page_sums<C, 4>(z, begin, end, a.size, values, out); break;
            }
        }
    }
}

// A head's key or value of position `place` into a page: value d to place step * d of `out`.
template <class C>
void store_head(const float* x, int64_t size, int64_t step, void* out, float*) {
    alignas(64) char values[kLargestHead * C::kSize];
    round_row<C>(x, size, values);
    char* to = static_cast<char*>(out);
    for (int64_t d = 0; d < size; ++d) std::memcpy(to + d * step * C::kSize, values + d * C::kSize, C::kSize);
}

// The same in int8, evenly spaced: x = code scale.
inline void store_head_int8(const float* x, int64_t size, int64_t step, void* out, float* scale) {
    float most = 0.0f;
    for (int64_t d = 0; d < size; ++d) most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
    *scale = most / 127.0f;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int8_t* const to = static_cast<int8_t*>(out);
    for (int64_t d = 0; d < size; ++d) to[d * step] = static_cast<int8_t>(lrintf(x[d] * inverse));
}

template <class T>
constexpr DecodeKernels decode_kernels = {
    finish_product<T>, norm_to_storage<T>,
    norm_in_place<T>,  round_row<T>,
    widen_row<T>,      add_row,
    turn_head,         {gated_row<T, Silu>, gated_row<T, GeluTanh>},
};

// The softmax over a vocabulary that comes in chunks: fold_softmax of rows.h, within rows.inl.
//
// A row of a chunk is read twice, from cache: for its largest logit, then for the sums and the gradient. The soft cap
// grows with the logit, so the largest is looked for without it.

namespace halfbyte {
namespace {

// The lanes of a step of which only the first n count; others get `rest`.
inline Lanes first_lanes(Lanes a, int64_t n, float rest) {
    alignas(64) static constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return n >= Lanes::kWidth ? a : select(read<Fp32>(kIndex, 0) < Lanes(static_cast<float>(n)), a, Lanes(rest));
}

inline float first_lane(Lanes a) {
    alignas(64) float values[Lanes::kWidth];
    write<Fp32>(values, 0, a);
    return values[0];
}

constexpr float kLowest = -3.4028234663852886e38f;

template <class T>
float largest_of(const void* x, int64_t n, Lanes scale) {
    constexpr int64_t kStep = Lanes::kWidth;
    Lanes best[4] = {kLowest, kLowest, kLowest, kLowest};
    int64_t i = 0;
    for (; i + 4 * kStep <= n; i += 4 * kStep)
        for (int k = 0; k < 4; ++k) best[k] = max(read<T>(x, i + k * kStep) * scale, best[k]);
    for (; i < n; i += kStep) best[0] = max(first_lanes(read<T>(x, i, n - i) * scale, n - i, kLowest), best[0]);
    return largest(max(max(best[0], best[1]), max(best[2], best[3])));
}

// The first index of `value`, which is the largest.
template <class T>
int64_t find(const void* x, int64_t n, Lanes scale, float value) {
    alignas(64) static constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t i = 0; i < n; i += Lanes::kWidth) {
        const Lanes at = first_lanes(read<T>(x, i, n - i) * scale, n - i, kLowest);
        const float place = -largest(select(at < Lanes(value), Lanes(-16.0f), -read<Fp32>(kIndex, 0)));
        if (place < 16.0f) return i + static_cast<int64_t>(place);
    }
    return 0;
}

// What becomes of a logit: z, and dz by the logit.
template <bool capped>
struct Transform {
    Lanes scale, cap, reciprocal;
    Transform(const FoldSoftmax& a) : scale(a.scale), cap(a.cap), reciprocal(capped ? 1.0f / a.cap : 0.0f) {}

    Lanes operator()(Lanes logit, Lanes* slope) const {
        *slope = scale;
        if (!capped) return logit * scale;
        const Lanes t = tanh(logit * scale * reciprocal);
        *slope = scale * (Lanes(1.0f) - t * t);
        return cap * t;
    }
};

template <class T, bool capped>
void fold_row(const FoldSoftmax& a, int64_t row) {
    const Transform<capped> transform(a);
    char* logits = static_cast<char*>(a.logits) + row * a.width * T::kSize;
    Lanes slope;

    const int64_t own = a.labels[row] - a.first;
    const bool inside = own >= 0 && own < a.width;
    if (inside) {
        a.label[row] = first_lane(transform(read<T>(logits, own, 1), &slope));
        a.slope[row] = first_lane(slope);
    }

    const float old = a.maximum[row], largest = largest_of<T>(logits, a.width, transform.scale);
    const float capped_largest =
        capped ? first_lane(transform.cap * tanh(Lanes(largest) * transform.reciprocal)) : largest;
    float maximum = old;
    if (capped_largest > old) {
        maximum = capped_largest;
        a.top[row] = a.first + find<T>(logits, a.width, transform.scale, largest);
    }

    Lanes sums, weighted, squares, total;
    for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
        const int64_t rest = a.width - i;
        const Lanes z = transform(read<T>(logits, i, rest), &slope);
        const Lanes below = z - Lanes(maximum);
        const Lanes e = first_lanes(exp(below), rest, 0.0f);
        sums = sums + e;
        weighted = weighted + first_lanes(e * below, rest, 0.0f);
        squares = fma(e, e, squares);
        total = total + first_lanes(z, rest, 0.0f);
        if (a.gradient) write<T>(logits, i, e * slope, rest);
    }
    if (a.gradient && inside) std::memset(logits + own * T::kSize, 0, T::kSize);

    const float shrink = first_lane(exp(Lanes(old - maximum)));
    a.weighted[row] = (a.weighted[row] + a.sum[row] * (old - maximum)) * shrink + sum(weighted);
    a.squares[row] = a.squares[row] * (shrink * shrink) + sum(squares);
    a.sum[row] = a.sum[row] * shrink + sum(sums);
    a.total[row] += sum(total);
    a.maximum[row] = maximum;
    a.shrink[row] = shrink;
}

template <class T>
void fold_rows(const FoldSoftmax& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) a.cap > 0 ? fold_row<T, true>(a, row) : fold_row<T, false>(a, row);
}

void fold_softmax(const FoldSoftmax& a, int64_t first, int64_t last) {
    switch (a.type) {
        case Type::fp32: return fold_rows<Fp32>(a, first, last);
        case Type::bf16: return fold_rows<Bf16>(a, first, last);
        case Type::fp16: return fold_rows<Fp16>(a, first, last);
    }
}

}  // namespace
}  // namespace halfbyte

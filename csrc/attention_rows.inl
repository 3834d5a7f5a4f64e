// The row functions of attention.h, written once: each tier's file includes this within its target region, after its
// lanes. P is the storage type of a left factor's elements, T that of the tensors.

namespace halfbyte {
namespace {

constexpr float kInfinity = __builtin_inff();

// z of attention.h. `slope` is the derivative of the soft cap there.
inline Lanes logits(Lanes products, float factor, float cap, Lanes* slope) {
    const Lanes z = products * Lanes(factor);
    if (cap == 0.0f) {
        *slope = Lanes(1.0f);
        return z;
    }
    const Lanes t = tanh(z * Lanes(1.0f / cap));
    *slope = Lanes(1.0f) - t * t;
    return t * Lanes(cap);
}

template <class P>
float weigh(const float* products, int64_t begin, int64_t end, float factor, float cap, float* maximum, float* total,
            void* p) {
    constexpr int64_t vectors = kStrip / Lanes::kWidth;
    Lanes z[vectors], most(-kInfinity), slope;
    for (int64_t i = 0; i < vectors; ++i) {
        const int64_t column = i * Lanes::kWidth;
        z[i] = logits(read<Fp32>(products, column), factor, cap, &slope);
        if (begin > column || end < column + Lanes::kWidth) {
            const Lanes index = read<Fp32>(kColumns.index, column);
            const Lanes before_end = select(index < Lanes(static_cast<float>(end)), z[i], Lanes(-kInfinity));
            z[i] = select(index < Lanes(static_cast<float>(begin)), Lanes(-kInfinity), before_end);
        }
        most = max(most, z[i]);
    }
    const float before = *maximum, in_row = largest(most);
    const float after = in_row > before ? in_row : before;
    float shrunk = 1.0f;
    if (after != before) {
        if (before != -kInfinity) {
            float powers[Lanes::kWidth];
            write<Fp32>(powers, 0, exp(Lanes(before - after)));
            shrunk = powers[0];
        }
        *maximum = after;
    }
    Lanes added(0.0f);
    for (int64_t i = 0; i < vectors; ++i) {
        const Lanes weight = exp(z[i] - Lanes(after));
        added = added + weight;
        write<P>(p, i * Lanes::kWidth, weight);
    }
    *total = *total * shrunk + sum(added);
    return shrunk;
}

template <class P>
void differentiate(const float* products, const float* dp, float key, const float* begin, const float* end,
                   const float* lse, const float* d, float factor, float cap, void* p, void* ds) {
    const Lanes here(key), zero(0.0f);
    for (int64_t i = 0; i < kStrip; i += Lanes::kWidth) {
        Lanes slope;
        const Lanes z = logits(read<Fp32>(products, i), factor, cap, &slope);
        const Lanes weight = exp(z - read<Fp32>(lse, i));
        const Lanes change = weight * (read<Fp32>(dp, i) - read<Fp32>(d, i)) * slope * Lanes(factor);
        const auto early = here < read<Fp32>(begin, i);
        const auto in_time = here < read<Fp32>(end, i);
        write<P>(p, i, select(early, zero, select(in_time, weight, zero)));
        write<P>(ds, i, select(early, zero, select(in_time, change, zero)));
    }
}

inline void shrink(float* x, float factor) {
    for (int64_t i = 0; i < kStrip; i += Lanes::kWidth) write<Fp32>(x, i, read<Fp32>(x, i) * Lanes(factor));
}

template <class T>
float dot(const void* x, const void* y, int64_t n) {
    Lanes all(0.0f);
    for (int64_t i = 0; i < n; i += Lanes::kWidth) all = fma(read<T>(x, i, n - i), read<T>(y, i, n - i), all);
    return sum(all);
}

template <class P, class T>
const AttentionKernels attention_kernels = {weigh<P>, differentiate<P>, shrink, dot<T>};

}  // namespace
}  // namespace halfbyte

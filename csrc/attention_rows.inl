// The row functions of attention.h, written once: included by each tier's file within its target region, after a class
// V of that tier's vectors. P stores elements of a left factor, T reads the storage type.

namespace halfbyte {
namespace {

// scale products, or with a soft cap: cap tanh(scale products / cap). `slope` is what a change of the logit before the
// cap makes of it after, 1 without one.
template <class V>
typename V::Float logits(typename V::Float products, float scale, float cap, typename V::Float* slope) {
    const typename V::Float z = V::multiply(products, V::set(scale));
    if (cap == 0) {
        *slope = V::set(1);
        return z;
    }
    const typename V::Float t = V::tanh(V::multiply(z, V::set(1 / cap)));
    *slope = V::subtract(V::set(1), V::multiply(t, t));
    return V::multiply(t, V::set(cap));
}

template <class V, class P>
float weigh(const float* products, int64_t begin, int64_t end, float scale, float cap, float* maximum, float* total,
            void* p) {
    constexpr int64_t vectors = kStrip / V::kWidth;
    typename V::Float z[vectors], most = V::set(-__builtin_inff()), slope;
    for (int64_t i = 0; i < vectors; ++i) {
        z[i] = logits<V>(V::load(products + i * V::kWidth), scale, cap, &slope);
        z[i] = V::choose(V::between(begin, i * V::kWidth, end), z[i], V::set(-__builtin_inff()));
        most = V::maximum(most, z[i]);
    }
    const float before = *maximum, in_row = V::largest(most);
    const float after = in_row > before ? in_row : before;
    float factor = 1;
    if (after != before) {
        factor = before == -__builtin_inff() ? 1 : V::first(V::exp(V::set(before - after)));
        *maximum = after;
    }
    typename V::Float sum = V::set(0);
    for (int64_t i = 0; i < vectors; ++i) {
        const typename V::Float weight = V::exp(V::subtract(z[i], V::set(after)));
        sum = V::add(sum, weight);
        P::store(p, i * V::kWidth, weight);
    }
    *total = *total * factor + V::sum(sum);
    return factor;
}

template <class V, class P>
void differentiate(const float* products, const float* dp, int32_t key, const int32_t* begin, const int32_t* end,
                   const float* lse, const float* d, float scale, float cap, void* p, void* ds) {
    for (int64_t i = 0; i < kStrip; i += V::kWidth) {
        typename V::Float slope;
        const typename V::Float z = logits<V>(V::load(products + i), scale, cap, &slope);
        const auto has = V::within(begin + i, key, end + i);
        const typename V::Float weight =
            V::choose(has, V::exp(V::subtract(z, V::load(lse + i))), V::set(0));
        const typename V::Float change = V::multiply(weight, V::subtract(V::load(dp + i), V::load(d + i)));
        const typename V::Float scaled = V::multiply(V::multiply(change, slope), V::set(scale));
        P::store(p, i, weight);
        P::store(ds, i, V::choose(has, scaled, V::set(0)));
    }
}

template <class V>
void shrink(float* x, float factor) {
    for (int64_t i = 0; i < kStrip; i += V::kWidth) V::store(x + i, V::multiply(V::load(x + i), V::set(factor)));
}

template <class V, class T>
float dot(const void* x, const void* y, int64_t n) {
    typename V::Float sum = V::set(0);
    int64_t i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) sum = V::add(sum, V::multiply(T::load(x, i), T::load(y, i)));
    if (i < n) {
        float rest[2][V::kWidth] = {};
        std::memcpy(rest[0], at(x, i, T::kSize), static_cast<size_t>((n - i) * T::kSize));
        std::memcpy(rest[1], at(y, i, T::kSize), static_cast<size_t>((n - i) * T::kSize));
        sum = V::add(sum, V::multiply(T::load(rest[0], 0), T::load(rest[1], 0)));
    }
    return V::sum(sum);
}

template <class V, class P, class T>
const AttentionKernels attention_kernels = {weigh<V, P>, differentiate<V, P>, shrink<V>, dot<V, T>};

}  // namespace
}  // namespace halfbyte

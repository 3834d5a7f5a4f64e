// The tail of every tier's lanes header, within its target region and namespaces: what follows from `Lanes` and its
// operations. It includes nothing.
//
// A tier's header defines, for Lanes::kWidth fp32 values at a time: conversion from a float (to every lane), read<T>,
// write<T> and nearest<T> for the storage types T, the operators + - * / and <, fma, min and max (b where a or b is
// NaN), abs, sqrt, select(mask, a, b), scale(a, n) = a 2^n for whole n from -151 to 129, and over the lanes the sum
// and the largest. `fma` rounds once where the tier has the instruction.

// The first n lanes from memory, the others zero; n may be more than there are lanes.
template <class T>
Lanes read(const void* x, int64_t i, int64_t n) {
    if (n >= Lanes::kWidth) return read<T>(x, i);
    alignas(64) char values[Lanes::kWidth * sizeof(float)] = {};
    std::memcpy(values, static_cast<const char*>(x) + i * T::kSize, static_cast<size_t>(n * T::kSize));
    return read<T>(values, 0);
}

// The first n lanes to memory.
template <class T>
void write(void* out, int64_t i, Lanes a, int64_t n) {
    if (n >= Lanes::kWidth) return write<T>(out, i, a);
    alignas(64) char values[Lanes::kWidth * sizeof(float)];
    write<T>(values, 0, a);
    std::memcpy(static_cast<char*>(out) + i * T::kSize, values, static_cast<size_t>(n * T::kSize));
}

// Within 2 units in the last place, subnormal results too; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) = 1 + r + r² p(r), p of least relative error (3.3e-9) in exp(r). ln 2 is
// split such that n times its upper part is exact. Beyond the limits of x the result is 0 or infinity anyway.
inline Lanes exp(Lanes x) {
    const Lanes limited = min(Lanes(89.0f), max(Lanes(-104.0f), x));
    const Lanes to_whole = 0x1.8p23f;
    const Lanes n = (limited * Lanes(1.44269504f) + to_whole) - to_whole;
    const Lanes r = fma(n, Lanes(2.12194440e-4f), fma(n, Lanes(-0.693359375f), limited));
    Lanes p = fma(r, Lanes(1.38131448e-3f), Lanes(8.36941879e-3f));
    p = fma(p, r, Lanes(4.16684560e-2f));
    p = fma(p, r, Lanes(0.166665152f));
    p = fma(p, r, Lanes(0.49999994f));
    return scale(Lanes(1.0f) + fma(r * r, p, r), n);
}

// 1 / (1 + exp(-x)), within 3 units in the last place; 0 where that is below the smallest normal number.
inline Lanes sigmoid(Lanes x) { return Lanes(1.0f) / (Lanes(1.0f) + exp(-x)); }

// Within 3 units in the last place. Near zero x + x³ p(x²), p of least relative error (4.8e-9) in tanh(x).
inline Lanes tanh(Lanes x) {
    const Lanes size = abs(x), square = x * x;
    Lanes p = fma(square, Lanes(-5.66697586e-3f), Lanes(2.06061751e-2f));
    p = fma(p, square, Lanes(-5.37300073e-2f));
    p = fma(p, square, Lanes(0.133313313f));
    p = fma(p, square, Lanes(-0.333332777f));
    const Lanes inner = fma(x * square, p, x);
    const Lanes outer = Lanes(1.0f) - Lanes(2.0f) / (Lanes(1.0f) + exp(size + size));
    return select(size < Lanes(0.625f), inner, select(x < Lanes(0.0f), -outer, outer));
}

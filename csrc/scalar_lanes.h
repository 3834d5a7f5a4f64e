// One fp32 value: the baseline's lane for the kernels that are written once for every tier (rows.h).

#pragma once

#include <cmath>

#include "scalar.h"

namespace halfbyte {
namespace {

struct Lanes {
    static constexpr int64_t kWidth = 1;
    using Mask = bool;
    float value;
    Lanes(float x = 0.0f) : value(x) {}
};

template <class T>
Lanes read(const void* x, int64_t i) {
    return T::load(x, i);
}
template <class T>
void write(void* out, int64_t i, Lanes a) {
    store(out, i, T::round(a.value));
}
template <class T>
Lanes nearest(Lanes a) {
    const typename T::Stored stored = T::round(a.value);
    return T::load(&stored, 0);
}

inline Lanes operator+(Lanes a, Lanes b) { return a.value + b.value; }
inline Lanes operator-(Lanes a, Lanes b) { return a.value - b.value; }
inline Lanes operator*(Lanes a, Lanes b) { return a.value * b.value; }
inline Lanes operator/(Lanes a, Lanes b) { return a.value / b.value; }
inline Lanes operator-(Lanes a) { return -a.value; }
// Rounded twice: without the instruction, std::fma is a slow function.
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return a.value * b.value + c.value; }
inline Lanes min(Lanes a, Lanes b) { return a.value < b.value ? a : b; }
inline Lanes max(Lanes a, Lanes b) { return a.value > b.value ? a : b; }
inline Lanes abs(Lanes a) { return std::fabs(a.value); }
inline Lanes sqrt(Lanes a) { return std::sqrt(a.value); }
inline bool operator<(Lanes a, Lanes b) { return a.value < b.value; }
inline Lanes select(bool mask, Lanes a, Lanes b) { return mask ? a : b; }

inline Lanes scale(Lanes a, Lanes n) {  // in two factors, since 2^n may lie outside fp32
    const int whole = n.value == n.value ? static_cast<int>(n.value) : 0, half = whole / 2;
    const auto power = [](int exponent) { return float_of(static_cast<uint32_t>(exponent + 127) << 23); };
    return a.value * power(half) * power(whole - half);
}

inline float sum(Lanes a) { return a.value; }
inline float largest(Lanes a) { return a.value; }

#include "lanes.inl"

}  // namespace
}  // namespace halfbyte

// The baseline tier: plain C++ for any processor, any block size and the short last block.

#include <algorithm>

#include "contract.h"

namespace halfbyte {
namespace {

uint32_t bits_of(float value) { return load<uint32_t>(&value, 0); }
float float_of(uint32_t bits) { return load<float>(&bits, 0); }

// The storage types: `load` element i as fp32, and round fp32 to nearest even. fp32 itself needs neither.
struct Fp32 {
    using Stored = float;
    static float load(const void* x, int64_t i) { return halfbyte::load<float>(x, i); }
    static Stored round(float value) { return value; }
};

struct Bf16 {
    using Stored = uint16_t;
    static float load(const void* x, int64_t i) { return float_of(uint32_t{halfbyte::load<uint16_t>(x, i)} << 16); }
    static Stored round(float value) {
        if (value != value) return 0x7fc0;
        const uint32_t bits = bits_of(value);
        return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Fp16 {
    using Stored = uint16_t;
    static float load(const void* x, int64_t i) {
        const uint32_t half = halfbyte::load<uint16_t>(x, i);
        const uint32_t sign = (half & 0x8000) << 16;
        const uint32_t magnitude = (half & 0x7fff) << 13;
        if (magnitude >= 0x0f800000) return float_of(sign | magnitude | 0x7f800000);  // infinity, NaN
        return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));              // exact, subnormals too
    }
    static Stored round(float value) {
        const uint32_t sign = bits_of(value) >> 16 & 0x8000;
        uint32_t magnitude = bits_of(value) & 0x7fffffff;
        if (magnitude > 0x7f800000) return 0x7e00;
        if (magnitude >= 0x47800000) return static_cast<Stored>(sign | 0x7c00);  // 2^16 and more: infinity
        if (magnitude < 0x38800000) {  // subnormal: the last place of 0.5f is the smallest fp16 value, 2^-24
            magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
            return static_cast<Stored>(sign | magnitude);
        }
        magnitude += 0xfff + (magnitude >> 13 & 1);
        return static_cast<Stored>(sign | (magnitude - 0x38000000) >> 13);
    }
};

template <class Stored>
void store(void* base, int64_t i, Stored value) {
    std::memcpy(static_cast<char*>(base) + i * static_cast<int64_t>(sizeof(Stored)), &value, sizeof(Stored));
}

template <int bits>
int descend(const float* midpoint, float value) {
    int node = 1;
    for (int step = 0; step < bits; ++step) node = 2 * node + !(midpoint[node] >= value);
    return node - (1 << bits);
}

int nearest(const Search4& search, float value) { return search.code[descend<4>(search.midpoint, value)]; }
int nearest(const Search8& search, float value) { return std::min(descend<8>(search.midpoint, value), search.last); }

void put(const Quantize4bit& a, int64_t i, int code) {
    uint8_t& byte = a.codes[i / 2];
    byte = static_cast<uint8_t>(i % 2 ? byte | code : code << 4);
}
void put(const Quantize8bit& a, int64_t i, int code) { a.codes[i] = static_cast<uint8_t>(code); }

void fill_up(const Quantize4bit& a) {
    if (a.n % 2) put(a, a.n, nearest(a.search, 0.0f));
}
void fill_up(const Quantize8bit&) {}

// NaN passes.
float clamp(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

// A whole block is multiplied by the reciprocal; a short one, always the tensor's last, is divided.
template <class T, class Arguments>
void quantize(const Arguments& a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * a.blocksize;
        const int64_t end = std::min(begin + a.blocksize, a.n);
        uint32_t largest = 0;  // the order of magnitudes is that of their bits, NaN on top
        for (int64_t i = begin; i < end; ++i) largest = std::max(largest, bits_of(T::load(a.x, i)) & 0x7fffffff);
        const float absmax = float_of(largest);
        const float divisor = absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax;
        if (end - begin == a.blocksize) {
            const float reciprocal = 1.0f / divisor;
            a.absmax[block] = absmax;
            for (int64_t i = begin; i < end; ++i) put(a, i, nearest(a.search, clamp(T::load(a.x, i) * reciprocal)));
        } else {
            a.absmax[block] = divisor;
            for (int64_t i = begin; i < end; ++i) put(a, i, nearest(a.search, clamp(T::load(a.x, i) / divisor)));
        }
        if (end == a.n) fill_up(a);
    }
}

int code_at(const Dequantize4bit& a, int64_t i) { return i % 2 ? a.codes[i / 2] & 15 : a.codes[i / 2] >> 4; }
int code_at(const Dequantize8bit& a, int64_t i) { return a.codes[i]; }

template <class T, class Arguments>
void dequantize(const Arguments& a, int64_t first, int64_t last) {
    ScaleReader scales(a.scales, first);
    for (int64_t block = first; block < last; ++block) {
        const float scale = scales.next();
        const int64_t end = std::min((block + 1) * a.blocksize, a.n);
        for (int64_t i = block * a.blocksize; i < end; ++i) store(a.out, i, T::round(a.code[code_at(a, i)] * scale));
    }
}

template <class Arguments>
void quantize_any(const Arguments& a, int64_t first, int64_t last) {
    switch (a.type) {
        case Type::fp32: return quantize<Fp32>(a, first, last);
        case Type::bf16: return quantize<Bf16>(a, first, last);
        case Type::fp16: return quantize<Fp16>(a, first, last);
    }
}

template <class Arguments>
void dequantize_any(const Arguments& a, int64_t first, int64_t last) {
    switch (a.type) {
        case Type::fp32: return dequantize<Fp32>(a, first, last);
        case Type::bf16: return dequantize<Bf16>(a, first, last);
        case Type::fp16: return dequantize<Fp16>(a, first, last);
    }
}

bool supported() { return true; }

}  // namespace

const Tier scalar = {
    "scalar", supported, quantize_any, quantize_any, dequantize_any, dequantize_any, nullptr,
};

}  // namespace halfbyte

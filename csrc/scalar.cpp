// The baseline tier: plain C++ for any processor, any block size and the short last block.

#include <algorithm>

#include "adamw.h"
#include "attention.h"
#include "rows.h"
#include "scalar.h"

namespace halfbyte {
namespace {

int nearest(const Search4& search, float value) { return search.code[descend<4>(search.midpoint, value)]; }

void put(const Quantize4bit& a, int64_t i, int code) {
    uint8_t& byte = a.codes[i / 2];
    byte = static_cast<uint8_t>(i % 2 ? byte | code : code << 4);
}
void put(const Quantize8bit& a, int64_t i, int code) { a.codes[i] = static_cast<uint8_t>(code); }

void fill_up(const Quantize4bit& a) {
    if (a.n % 2) put(a, a.n, nearest(a.search, 0.0f));
}
void fill_up(const Quantize8bit&) {}

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
    "scalar",       supported, quantize_any,  quantize_any, dequantize_any,
    dequantize_any, nullptr,   &scalar_adamw, &scalar_rows, nullptr,
};

}  // namespace halfbyte

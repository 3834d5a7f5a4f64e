// What the checks of kernels are made of: random numbers, exact buffers, and a case, which describes itself.
//
// Every buffer is a heap block of exactly the size that a kernel may touch, at an odd address where any is allowed, so
// that a run under AddressSanitizer sees each byte beyond; outputs are full of what no kernel writes.

#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract.h"
#include "matmul.h"
#include "scalar.h"

namespace halfbyte {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

class Random {  // splitmix64
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
    bool once_in(int64_t n) { return below(n) == 0; }
    float uniform(float least, float most) {
        return least + (most - least) * static_cast<float>(bits() >> 40) * 0x1p-24f;
    }
    float normal() { return uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1); }
    float special() { return of({0.0f, -0.0f, 1e-45f, -1e-39f, 6e-8f, 1e30f, -3e38f, kInfinity, -kInfinity, kNaN}); }
    template <class T>
    T of(std::initializer_list<T> values) {
        return values.begin()[below(static_cast<int64_t>(values.size()))];
    }

  private:
    uint64_t state_;
};

// `size` bytes, of which each is `fill`, `shift` bytes beyond an aligned address.
struct Buffer {
    Buffer(int64_t size, int64_t shift, int fill) : room(new uint8_t[static_cast<size_t>(shift + size)]), size(size) {
        data = room.get() + shift;
        std::memset(data, fill, static_cast<size_t>(size));
    }
    Buffer(const Buffer& other) : Buffer(other.size, other.data - other.room.get(), 0) {
        std::memcpy(data, other.data, static_cast<size_t>(size));
    }
    Buffer(Buffer&&) = default;
    float* floats() const { return reinterpret_cast<float*>(data); }

    std::unique_ptr<uint8_t[]> room;
    uint8_t* data;
    int64_t size;
};

constexpr int kOurs = 0x77, kTheirs = 0x88;  // poison of outputs; as numbers of any type finite and unlikely

inline int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }
inline const char* name_of(Type type) { return type == Type::fp32 ? "fp32" : type == Type::bf16 ? "bf16" : "fp16"; }

inline float get(const void* x, int64_t i, Type type) {
    return type == Type::fp32 ? Fp32::load(x, i) : type == Type::bf16 ? Bf16::load(x, i) : Fp16::load(x, i);
}
inline void put(void* x, int64_t i, Type type, float value) {
    if (type == Type::fp32) store(x, i, value);
    else store(x, i, type == Type::bf16 ? Bf16::round(value) : Fp16::round(value));
}

// Half the distance of neighbours at `value`: what rounding to the type may take away. Infinite beyond its largest.
inline double rounding(double value, Type type) {
    const double relative = type == Type::fp32 ? 0x1p-24 : type == Type::bf16 ? 0x1p-8 : 0x1p-11;
    const double smallest = type == Type::fp16 ? 0x1p-14 : 0x1p-126, largest = type == Type::fp16 ? 65504 : 3.38e38;
    return std::abs(value) > largest ? kInfinity : relative * std::max(std::abs(value), smallest);
}

// One case: what it is run on, where its numbers come from, and its description so far.
struct Case {
    const Tier& tier;
    Random random;
    std::ostringstream description;

    template <class T>
    T note(const char* name, T value) {
        description << ' ' << name << '=' << value;
        return value;
    }
    Type type() {
        const Type type = random.of({Type::fp32, Type::bf16, Type::fp16});
        note("type", name_of(type));
        return type;
    }
    int64_t length() { return note("n", random.once_in(20) ? 0 : random.below(random.of({40, 700, 9000}))); }
    int64_t blocksize() { return note("blocksize", random.of<int64_t>({64, 128, 32, 256, 1024, 4096, 96, 48, 7, 1})); }
    int64_t shift() { return note("shift", random.once_in(2) ? 0 : random.below(8)); }
    int64_t gap() { return random.once_in(3) ? random.below(9) : 0; }

    // n values of the type, of which some are special.
    Buffer values(int64_t n, Type type, bool special = true) {
        Buffer x(n * size_of(type), shift(), 0);
        const bool some = special && note("special", random.once_in(3));
        const float scale = std::pow(10.0f, random.once_in(3) ? random.uniform(-42, 36) : 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            put(x.data, i, type, some && random.once_in(50) ? random.special() : random.normal() * scale);
        }
        return x;
    }
    Buffer floats(int64_t n, int64_t shift, float least, float most, bool special = false) {
        Buffer x(4 * n, shift, 0);
        for (int64_t i = 0; i < n; ++i) {
            const float value = random.uniform(least, most);
            store(x.data, i, special && random.once_in(30) ? random.special() : value);
        }
        return x;
    }
    Buffer bytes(int64_t n, int64_t shift) {
        Buffer x(n, shift, 0);
        for (int64_t i = 0; i < n; ++i) x.data[i] = static_cast<uint8_t>(random.below(256));
        return x;
    }

    void require(bool holds, const std::string& otherwise) const {
        if (!holds) throw std::runtime_error(otherwise);
    }
    // Equal bit for bit, but for a NaN's payload.
    void same(const Buffer& got, const Buffer& expected, Type type, const char* what) const {
        for (int64_t i = 0; i < got.size / size_of(type); ++i) {
            const float a = get(got.data, i, type), b = get(expected.data, i, type);
            const bool equal = bits_of(a) == bits_of(b) || (a != a && b != b);
            if (!equal) require(false, differ(what, i, a, b));
        }
    }
    void same(const Buffer& got, const Buffer& expected, const char* what) const {
        for (int64_t i = 0; i < got.size; ++i) {
            if (got.data[i] != expected.data[i]) require(false, differ(what, i, got.data[i], expected.data[i]));
        }
    }
    static std::string differ(const char* what, int64_t i, double got, double expected) {
        char text[128];
        std::snprintf(text, sizeof text, "%s[%" PRId64 "] is %.9g, not %.9g", what, i, got, expected);
        return text;
    }
};

// An 8-bit dynamic map: 2^k even parts of [0.1, 1] in decade k of 7, and without signs twice as many.
inline std::vector<float> dynamic_map(bool with_signs) {
    std::vector<float> values{0.0f, 1.0f};
    for (int decade = 0; decade < 7; ++decade) {
        const int parts = 1 << (decade + !with_signs);
        for (int i = 0; i < parts; ++i) {
            const double value = std::pow(10.0, decade - 6) * (0.1 + 0.9 * (i + 0.5) / parts);
            values.push_back(static_cast<float>(value));
            if (with_signs) values.push_back(static_cast<float>(-value));
        }
    }
    std::sort(values.begin(), values.end());
    return values;
}

// NF4 in a coarse copy, or any values, some of them equal.
inline std::vector<float> table_of(Case& c, int64_t size) {
    if (size == 256 && c.note("dynamic", !c.random.once_in(3))) return dynamic_map(c.random.once_in(2));
    std::vector<float> values{-1,    -0.69f, -0.52f, -0.39f, -0.28f, -0.18f, -0.09f, 0,
                              0.08f, 0.16f,  0.24f,  0.33f,  0.44f,  0.56f,  0.72f,  1};
    if (size == 16 && c.note("nf4", c.random.once_in(2))) return values;
    values.clear();
    for (int64_t i = 0; i < size; ++i) values.push_back(c.random.once_in(9) ? 0.25f : c.random.uniform(-1, 1));
    if (size != 16) std::sort(values.begin(), values.end());
    return values;
}

// The scales of `blocks` blocks, and where their numbers are.
struct Statistics {
    bool doubly;
    int64_t size;  // of a block of the second quantization
    Buffer absmax, nested;
    Scales scales{};

    Statistics(Case& c, int64_t blocks, bool special)
        : doubly(c.note("nested", c.random.once_in(2))),
          size(c.note("nested_blocksize", doubly ? c.random.of<int64_t>({256, 64, 7, 1}) : 0)),
          absmax(doubly ? c.bytes(blocks, c.shift()) : c.floats(blocks, c.shift(), 0.1f, 1.0f, special)),
          nested(c.floats(doubly ? (blocks + size - 1) / size : 0, c.shift(), 0.1f, 0.4f, special)) {
        scales.absmax = absmax.data;
        scales.nested = doubly;
        if (!doubly) return;
        scales.nested_absmax = nested.data;
        scales.nested_blocksize = size;
        std::memcpy(scales.nested_code, dynamic_map(true).data(), sizeof scales.nested_code);
        scales.offset = 0.5f;
    }

    float of(int64_t block) const {
        if (!doubly) return load<float>(absmax.data, block);
        return scales.nested_code[absmax.data[block]] * load<float>(nested.data, block / size) + scales.offset;
    }
};

// The groups of checks.
void quantize_4bit(Case& c);
void quantize_8bit(Case& c);
void dequantize_4bit(Case& c);
void dequantize_8bit(Case& c);
void matmul(Case& c);
void few(Case& c);
void multiply(Case& c);
void elementary(Case& c);
void rms_norm(Case& c);
void gated(Case& c);
void rotary(Case& c);
void fold_softmax(Case& c);
void attention(Case& c);
void decode(Case& c);
void adamw_32bit(Case& c);
void adamw_8bit(Case& c);

}  // namespace halfbyte

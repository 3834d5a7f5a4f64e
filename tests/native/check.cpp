// Checks the kernels without Python: every tier of this build that the chip supports, on random shapes and values.
//
//     check [--seed S] [--cases N | --seconds T] [--tier NAME] [--group NAME]
//
// Case i of a group is made from the seed S + i alone, N cases a group or as many as fit into T seconds. A failure is
// described with the options that repeat it. Quantizing, dequantizing and AdamW must give the bytes of the tier
// `scalar`, which is held against the formulas in double; products must lie within a bound of the product of the
// dequantized weight in double, and be the same bytes for every number of threads.
//
// Every buffer is a heap block of exactly the size that a kernel may touch, at an odd address where any is allowed, so
// that a run under AddressSanitizer sees each byte beyond; outputs are full of what no kernel writes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "adamw.h"
#include "dispatch.h"
#include "matmul.h"
#include "parallel.h"
#include "scalar.h"
#include "tables.h"

namespace halfbyte {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// The tiers to check. `scalar` comes last.
std::vector<const Tier*> tiers() { return available_tiers(); }

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

int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }
const char* name_of(Type type) { return type == Type::fp32 ? "fp32" : type == Type::bf16 ? "bf16" : "fp16"; }

float get(const void* x, int64_t i, Type type) {
    return type == Type::fp32 ? Fp32::load(x, i) : type == Type::bf16 ? Bf16::load(x, i) : Fp16::load(x, i);
}
void put(void* x, int64_t i, Type type, float value) {
    if (type == Type::fp32) store(x, i, value);
    else store(x, i, type == Type::bf16 ? Bf16::round(value) : Fp16::round(value));
}

// Half the distance of neighbours at `value`: what rounding to the type may take away. Infinite beyond its largest.
double rounding(double value, Type type) {
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
    int64_t blocksize() { return note("blocksize", random.of<int64_t>({64, 128, 32, 256, 1024, 4096, 96, 48, 7, 1})); }
    int64_t shift(int64_t most = 7) { return note("shift", random.once_in(2) ? 0 : random.below(most + 1)); }

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

// Tables ------------------------------------------------------------------------------------------------------------

// An 8-bit dynamic map: 2^k even parts of [0.1, 1] in decade k of 7, and without signs twice as many.
std::vector<float> dynamic_map(bool with_signs) {
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
std::vector<float> table_of(Case& c, int64_t size) {
    if (size == 256 && c.note("dynamic", !c.random.once_in(3))) return dynamic_map(c.random.once_in(2));
    std::vector<float> values{-1,    -0.69f, -0.52f, -0.39f, -0.28f, -0.18f, -0.09f, 0,
                              0.08f, 0.16f,  0.24f,  0.33f,  0.44f,  0.56f,  0.72f,  1};
    if (size == 16 && c.note("nf4", c.random.once_in(2))) return values;
    values.clear();
    for (int64_t i = 0; i < size; ++i) values.push_back(c.random.once_in(9) ? 0.25f : c.random.uniform(-1, 1));
    if (size != 16) std::sort(values.begin(), values.end());
    return values;
}

// Quantizing --------------------------------------------------------------------------------------------------------

int64_t codes_size(int bits, int64_t n) { return bits == 4 ? (n + 1) / 2 : n; }
int code_of(int bits, const uint8_t* codes, int64_t i) { return bits == 4 ? code_at(codes, i) : codes[i]; }

// Run a kernel over the blocks in up to three ranges; with 4 bits each begins with a byte.
template <class Arguments>
void in_ranges(Case& c, void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& a) {
    const int64_t blocks = (a.n + a.blocksize - 1) / a.blocksize;
    const int64_t first = c.note("split", c.random.below(blocks / 2 + 1) * 2);
    const int64_t second = first + c.random.below((blocks - first) / 2 + 1) * 2;
    kernel(a, 0, first);
    kernel(a, first, second);
    kernel(a, second, blocks);
}

int64_t length(Case& c) { return c.note("n", c.random.once_in(20) ? 0 : c.random.below(c.random.of({40, 700, 9000}))); }

template <int bits, class Search>
void quantize(Case& c, void (*const kernel)(const Quantize<Search>&, int64_t, int64_t),
              void (*const plain)(const Quantize<Search>&, int64_t, int64_t),
              Search (*const make)(const std::vector<float>&)) {
    const Type type = c.type();
    const int64_t n = length(c), blocksize = c.blocksize();
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    const std::vector<float> code = table_of(c, bits == 4 ? 16 : c.note("codes", c.random.of({256, 255, 2, 17})));
    const Buffer x = c.values(n, type);
    const Buffer codes(codes_size(bits, n), c.shift(), kOurs), absmax(4 * blocks, 0, kOurs);
    const Buffer their_codes(codes.size, 0, kTheirs), their_absmax(absmax.size, 0, kTheirs);
    const Search search = make(code);
    in_ranges<Quantize<Search>>(c, kernel, {x.data, type, n, blocksize, search, codes.data, absmax.floats()});
    plain({x.data, type, n, blocksize, search, their_codes.data, their_absmax.floats()}, 0, blocks);
    c.same(codes, their_codes, "codes");
    c.same(absmax, their_absmax, Type::fp32, "absmax");
    for (int64_t i = 0; i < n; ++i) {
        const float statistic = load<float>(absmax.data, i / blocksize);
        if (!(statistic >= kSmallestAbsmax && statistic < kInfinity)) continue;
        const double value = double{get(x.data, i, type)} / statistic;
        const double distance = std::abs(code[static_cast<size_t>(code_of(bits, codes.data, i))] - value);
        for (const float other : code) {
            if (std::abs(other - value) < distance - 3e-7) c.require(false, c.differ("code nearest to x", i, value, other));
        }
    }
}

void quantize_4bit(Case& c) {
    quantize<4, Search4>(c, c.tier.quantize_4bit, scalar.quantize_4bit,
                         [](const std::vector<float>& code) { return search4(code.data()); });
}

void quantize_8bit(Case& c) {
    quantize<8, Search8>(c, c.tier.quantize_8bit, scalar.quantize_8bit, [](const std::vector<float>& code) {
        return search8(code.data(), static_cast<int>(code.size()));
    });
}

// Dequantizing ------------------------------------------------------------------------------------------------------

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

template <int bits>
void dequantize(Case& c, void (*kernel)(const Dequantize<bits>&, int64_t, int64_t),
                void (*plain)(const Dequantize<bits>&, int64_t, int64_t)) {
    const Type type = c.type();
    const int64_t n = length(c), blocksize = c.blocksize(), blocks = (n + blocksize - 1) / blocksize;
    const Buffer codes = c.bytes(codes_size(bits, n), c.shift());
    const std::vector<float> code = table_of(c, 1 << bits);
    const Statistics statistics(c, blocks, c.note("special", c.random.once_in(3)));
    const Buffer out(n * size_of(type), c.shift(), kOurs), theirs(out.size, 0, kTheirs);
    Dequantize<bits> a{codes.data, {}, statistics.scales, n, blocksize, out.data, type};
    std::memcpy(a.code, code.data(), sizeof a.code);
    in_ranges(c, kernel, a);
    a.out = theirs.data;
    plain(a, 0, blocks);
    c.same(out, theirs, type, "out");
    for (int64_t i = 0; i < n; ++i) {
        const float value = code[static_cast<size_t>(code_of(bits, codes.data, i))] * statistics.of(i / blocksize);
        const float got = get(out.data, i, type);
        const bool right = value == value && std::abs(value) < kInfinity
                               ? std::abs(double{got} - value) <= rounding(value, type)
                               : got == value || (got != got && value != value);
        c.require(right, c.differ("out", i, got, value));
    }
}

void dequantize_4bit(Case& c) { dequantize<4>(c, c.tier.dequantize_4bit, scalar.dequantize_4bit); }
void dequantize_8bit(Case& c) { dequantize<8>(c, c.tier.dequantize_8bit, scalar.dequantize_8bit); }

// Products ----------------------------------------------------------------------------------------------------------

// Each element of y = x W (+ bias) within the rounding to its type, and 2e-6 of the sum of magnitudes for the sums in
// fp32, of the product in double. Where that is NaN or infinite so must be y.
void close(Case& c, const Buffer& y, const Buffer& x, const std::vector<double>& w, const Buffer* bias, int64_t rows,
           int64_t depth, int64_t width, Type type) {
    std::vector<double> sums(static_cast<size_t>(width)), sizes(sums.size());
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
            sums[static_cast<size_t>(i)] = bias ? get(bias->data, i, type) : 0.0;
            sizes[static_cast<size_t>(i)] = std::abs(sums[static_cast<size_t>(i)]);
        }
        for (int64_t k = 0; k < depth; ++k) {
            const double factor = get(x.data, r * depth + k, type);
            const double* const row = w.data() + k * width;
            for (size_t i = 0; i < sums.size(); ++i) {
                sums[i] += factor * row[i];
                sizes[i] += std::abs(factor * row[i]);
            }
        }
        for (int64_t i = 0; i < width; ++i) {
            const double got = get(y.data, r * width + i, type), expected = sums[static_cast<size_t>(i)];
            const double bound = 1.01 * rounding(expected, type) + 2e-6 * sizes[static_cast<size_t>(i)];
            const bool right = std::isfinite(expected) ? std::abs(got - expected) <= bound
                                                       : got == expected || (got != got && expected != expected);
            c.require(right, c.differ("y", r * width + i, got, expected));
        }
    }
}

void matmul(Case& c) {
    const Type type = c.type();
    const bool gradient = c.note("gradient", c.random.once_in(2));
    const int64_t rows = c.note("rows", c.random.below(c.random.of({9, 20, 20, 300})));
    const int64_t most = c.random.of({70, 300, 300, 2600});
    int64_t shape[2] = {1 + c.random.below(most), 1 + c.random.below(200000 / most)};
    if (c.random.once_in(2)) std::swap(shape[0], shape[1]);
    if (c.random.once_in(2)) shape[1] = (shape[1] + 31) / 32 * 32;
    const int64_t n = c.note("N", shape[0]), k = c.note("K", shape[1]), values = n * k;
    const int64_t depth = gradient ? n : k, width = gradient ? k : n, blocksize = c.blocksize();
    const int64_t blocks = (values + blocksize - 1) / blocksize;

    const Buffer codes = c.bytes((values + 1) / 2, c.shift());
    const std::vector<float> code = table_of(c, 16);
    const Statistics statistics(c, blocks, false);
    Weight4bit weight{codes.data, {}, statistics.scales, Divisor(blocksize), Divisor(statistics.size),
                      n, k, 0};
    std::memcpy(weight.code, code.data(), sizeof weight.code);
    const int64_t piece = (blocksize | k) & -(blocksize | k);
    weight.piece = piece >= 32 ? piece : 0;
    std::vector<double> dense(static_cast<size_t>(values));  // depth x width
    for (int64_t i = 0; i < values; ++i) {
        float value = 0;
        put(&value, 0, type, code[static_cast<size_t>(code_at(codes.data, i))] * statistics.of(i / blocksize));
        dense[static_cast<size_t>(gradient ? i : i % k * n + i / k)] = get(&value, 0, type);
    }

    Buffer x(rows * depth * size_of(type), c.shift(), 0), bias(width * size_of(type), c.shift(), 0);
    for (int64_t i = 0; i < rows * depth; ++i) put(x.data, i, type, c.random.normal());
    for (int64_t i = 0; i < width; ++i) put(bias.data, i, type, c.random.normal());
    for (int64_t i = c.note("special", c.random.once_in(4)) && rows ? 3 : 0; i > 0; --i) {
        put(x.data, c.random.below(rows * depth), type, c.random.of({kInfinity, -kInfinity, kNaN}));
    }
    const bool biased = c.note("bias", c.random.once_in(2));
    const int64_t shift = c.shift();
    std::unique_ptr<Buffer> first;
    for (const int threads : {1, 2, 3}) {
        auto y = std::make_unique<Buffer>(rows * width * size_of(type), shift, kOurs + threads);
        const Matmul4bit a{x.data, rows, type, gradient, weight, biased ? bias.data : nullptr, y->data};
        matmul(*c.tier.matmul(type), a, threads);
        if (first) c.same(*y, *first, "y of some threads");
        else first = std::move(y);
    }
    close(c, *first, x, dense, biased ? &bias : nullptr, rows, depth, width, type);
}

// AdamW -------------------------------------------------------------------------------------------------------------

Adamw constants(Case& c) {
    const double beta1 = c.note("beta1", c.random.of({0.9, 0.5, 0.2, 0.0})), beta2 = c.random.of({0.999, 0.95, 0.0});
    const int step = static_cast<int>(c.note("step", c.random.of({1, 2, 1000})));
    const double values[] = {1 - 1e-2 * 0.1, beta1, 1 - beta1, beta2, 1 - beta2, std::sqrt(1 - std::pow(beta2, step)),
                             1e-8, -1e-2 / (1 - std::pow(beta1, step))};
    float rounded[8];
    for (int i = 0; i < 8; ++i) rounded[i] = static_cast<float>(values[i]);
    return {rounded[0], rounded[1], rounded[2], rounded[3], rounded[4], rounded[5], rounded[6], rounded[7]};
}

// A tensor that is stepped, alike for two tiers when copied.
struct Tensor {
    int64_t n;
    Type type;
    Buffer param, grad, m, v, m_absmax, v_absmax;  // moments: fp32, or codes and the scales of their blocks

    Tensor(Case& c, int64_t blocksize)
        : n(length(c)),
          type(c.type()),
          param(c.values(n, type, false)),
          grad(c.values(n, type)),
          m(blocksize ? c.bytes(n, c.shift()) : c.floats(n, 0, -1, 1)),
          v(blocksize ? c.bytes(n, c.shift()) : c.floats(n, 0, 0, 1)),
          m_absmax(c.floats(blocksize ? (n + blocksize - 1) / blocksize : 0, 0, 0, 1)),
          v_absmax(c.floats(m_absmax.size / 4, 0, 0, 1)) {}

    Stepped32bit over_32bit() const { return {param.data, grad.data, m.floats(), v.floats(), n, type}; }
    Stepped8bit over_8bit() const {
        return {param.data, grad.data, {m.data, m_absmax.floats()}, {v.data, v_absmax.floats()}, n, type};
    }
};

// The tensors after a step, against those of the tier `scalar`, and their parameters against the formula in double.
// `moments` gives m and v of a value before the step.
template <class Moments>
void stepped(Case& c, const Adamw& a, const std::vector<Tensor>& before, const std::vector<Tensor>& ours,
             const std::vector<Tensor>& theirs, bool fp32, const Moments& moments) {
    for (size_t t = 0; t < ours.size(); ++t) {
        const Tensor &got = ours[t], &expected = theirs[t], &old = before[t];
        c.same(got.param, expected.param, got.type, "param");
        if (fp32) {
            c.same(got.m, expected.m, Type::fp32, "m");
            c.same(got.v, expected.v, Type::fp32, "v");
        } else {
            c.same(got.m, expected.m, "codes of m");
            c.same(got.v, expected.v, "codes of v");
            c.same(got.m_absmax, expected.m_absmax, Type::fp32, "absmax of m");
            c.same(got.v_absmax, expected.v_absmax, Type::fp32, "absmax of v");
        }
        for (int64_t i = 0; i < got.n; ++i) {
            const double g = get(old.grad.data, i, old.type), p = get(old.param.data, i, old.type);
            if (!(std::abs(g) < 1e15 && std::abs(g) > 1e-15)) continue;
            const auto [m, v] = moments(old, i);
            const double kept = double{a.beta1} * m, new_v = double{a.beta2} * v + double{a.rest2} * g * g;
            if (!(v >= 0 && new_v > 0 && std::isfinite(p))) continue;
            const double factor = a.rate / (std::sqrt(new_v) / a.correction + a.eps);
            const double value = a.decay * p + factor * (kept + a.rest1 * g);
            const double inexact = std::abs(a.decay * p) + std::abs(factor) * (std::abs(kept) + std::abs(g));
            const double difference = std::abs(get(got.param.data, i, got.type) - value);
            const bool right = difference <= 1.01 * rounding(value, got.type) + 1e-6 * inexact;
            c.require(right, c.differ("param", i, get(got.param.data, i, got.type), value));
        }
    }
}

std::vector<Tensor> tensors(Case& c, int64_t blocksize) {
    std::vector<Tensor> tensors;
    for (int64_t i = c.note("tensors", 1 + c.random.below(4)); i > 0; --i) tensors.emplace_back(c, blocksize);
    return tensors;
}

void adamw_32bit(Case& c) {
    const Adamw a = constants(c);
    const std::vector<Tensor> before = tensors(c, 0), ours = before, theirs = before;
    const auto step = [&](const AdamwKernels& kernels, const std::vector<Tensor>& tensors, int threads) {
        std::vector<Stepped32bit> stepped;
        for (const Tensor& t : tensors) stepped.push_back(t.over_32bit());
        adamw_32bit(kernels, a, stepped, threads);
    };
    step(*c.tier.adamw, ours, c.note("threads", 1 + static_cast<int>(c.random.below(3))));
    step(scalar_adamw, theirs, 1);
    stepped(c, a, before, ours, theirs, true, [](const Tensor& t, int64_t i) {
        return std::pair<double, double>(t.m.floats()[i], t.v.floats()[i]);
    });
}

void adamw_8bit(Case& c) {
    const Adamw a = constants(c);
    const int64_t blocksize = c.blocksize();
    const auto m = std::make_unique<Table8bit>(table8bit(table_of(c, 256).data()));
    const auto v = std::make_unique<Table8bit>(table8bit(table_of(c, 256).data()));
    const std::vector<Tensor> before = tensors(c, blocksize), ours = before, theirs = before;
    const auto step = [&](const AdamwKernels& kernels, const std::vector<Tensor>& tensors, int threads) {
        std::vector<Stepped8bit> stepped;
        for (const Tensor& t : tensors) stepped.push_back(t.over_8bit());
        adamw_8bit(kernels, a, {*m, *v, blocksize}, stepped, threads);
    };
    step(*c.tier.adamw, ours, c.note("threads", 1 + static_cast<int>(c.random.below(3))));
    step(scalar_adamw, theirs, 1);
    stepped(c, a, before, ours, theirs, false, [&](const Tensor& t, int64_t i) {
        const double old_m = m->value[t.m.data[i]] * t.m_absmax.floats()[i / blocksize];
        return std::pair<double, double>(old_m, v->value[t.v.data[i]] * t.v_absmax.floats()[i / blocksize]);
    });
}

// Threads -----------------------------------------------------------------------------------------------------------

// Several threads call at once: each index is worked on once, in ranges as promised.
void parallel(Case& c) {
    const int64_t count = c.note("count", c.random.below(3000)), grain = c.note("grain", 1 + c.random.below(400));
    const int threads = c.note("threads", 1 + static_cast<int>(c.random.below(4)));
    std::vector<std::vector<int>> visits(static_cast<size_t>(c.note("callers", 1 + c.random.below(3))),
                                         std::vector<int>(static_cast<size_t>(count)));
    std::atomic<bool> right{true};
    const auto call = [&](std::vector<int>& mine) {
        parallel_for(count, grain, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) ++mine[static_cast<size_t>(i)];
            if (first % grain || (last - first > grain && threads > 1 && count > grain)) right = false;
        });
    };
    std::vector<std::thread> callers;
    for (auto& mine : visits) callers.emplace_back(call, std::ref(mine));
    for (auto& caller : callers) caller.join();
    for (const auto& mine : visits) right = right && mine == std::vector<int>(mine.size(), 1);
    c.require(right, "an index was not visited exactly once, or in a range that was not promised");
}

// The program -------------------------------------------------------------------------------------------------------

bool every(const Tier&) { return true; }
bool multiplies(const Tier& tier) { return tier.matmul; }
bool baseline(const Tier& tier) { return &tier == &scalar; }

struct Group {
    const char* name;
    void (*check)(Case&);
    bool (*concerns)(const Tier&);
};

const Group groups[] = {
    {"quantize_4bit", quantize_4bit, every},     {"quantize_8bit", quantize_8bit, every},
    {"dequantize_4bit", dequantize_4bit, every}, {"dequantize_8bit", dequantize_8bit, every},
    {"matmul", matmul, multiplies},              {"adamw_32bit", adamw_32bit, every},
    {"adamw_8bit", adamw_8bit, every},           {"parallel", parallel, baseline},
};

struct Options {
    uint64_t seed = 1;
    int64_t cases = 150;
    double seconds = 0;  // for each group; 0: count the cases
    std::string tier, group;
};

const char* running_group = "";
uint64_t running_seed = 0;
const Case* running = nullptr;

void tell_failure(const char* what) {
    if (!running) return;
    std::fprintf(stderr, "FAILED: --tier %s --group %s --seed %" PRIu64 " --cases 1:%s: %s\n", running->tier.name,
                 running_group, running_seed, running->description.str().c_str(), what);
}

bool run(const Tier& tier, const Group& group, const Options& options) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(options.seconds);
    int64_t i = 0;
    for (; options.seconds > 0 ? Clock::now() < end : i < options.cases; ++i) {
        Case c{tier, Random(options.seed + static_cast<uint64_t>(i)), {}};
        running = &c;
        running_group = group.name;
        running_seed = options.seed + static_cast<uint64_t>(i);
        try {
            group.check(c);
        } catch (const std::runtime_error& failure) {
            tell_failure(failure.what());
            return false;
        }
        running = nullptr;
    }
    std::printf("%-8s %-16s %6" PRId64 " cases\n", tier.name, group.name, i);
    std::fflush(stdout);
    return true;
}

int main(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; i += 2) {
        const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
        if (name == "--seed") options.seed = std::strtoull(value.c_str(), nullptr, 10);
        else if (name == "--cases") options.cases = std::atoll(value.c_str());
        else if (name == "--seconds") options.seconds = std::atof(value.c_str());
        else if (name == "--tier") options.tier = value;
        else if (name == "--group") options.group = value;
        else return std::fprintf(stderr, "Unknown option %s\n", name.c_str()), 2;
    }
    int ran = 0;
    for (const Tier* tier : tiers()) {
        for (const Group& group : groups) {
            if (!options.tier.empty() && options.tier != tier->name) continue;
            if (!options.group.empty() && options.group != group.name) continue;
            if (!group.concerns(*tier)) continue;
            if (!run(*tier, group, options)) return 1;
            ++ran;
        }
    }
    return ran ? 0 : (std::fprintf(stderr, "No such tier here, or no such group.\n"), 2);
}

}  // namespace
}  // namespace halfbyte

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

int main(int count, char** arguments) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    __sanitizer_set_death_callback([] { halfbyte::tell_failure("a sanitizer's report, above"); });
#endif
    return halfbyte::main(count, arguments);
}

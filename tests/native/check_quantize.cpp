// Quantizing and dequantizing: the bytes of the tier `scalar`; and of those, that a code is the nearest to its value,
// and a value the rounded product of its code's and the block's scale.

#include "case.h"
#include "tables.h"

namespace halfbyte {
namespace {

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

template <int bits, class Search>
void quantize(Case& c, void (*const kernel)(const Quantize<Search>&, int64_t, int64_t),
              void (*const plain)(const Quantize<Search>&, int64_t, int64_t),
              Search (*const make)(const std::vector<float>&)) {
    const Type type = c.type();
    const int64_t n = c.length(), blocksize = c.blocksize();
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
            if (std::abs(other - value) < distance - 3e-7) {
                c.require(false, c.differ("code nearest to x", i, value, other));
            }
        }
    }
}

template <int bits>
void dequantize(Case& c, void (*kernel)(const Dequantize<bits>&, int64_t, int64_t),
                void (*plain)(const Dequantize<bits>&, int64_t, int64_t)) {
    const Type type = c.type();
    const int64_t n = c.length(), blocksize = c.blocksize(), blocks = (n + blocksize - 1) / blocksize;
    const Buffer codes = c.bytes(codes_size(bits, n), c.shift());
    std::vector<float> code = table_of(c, 1 << bits);
    const bool integers = bits == 8 && c.note("integers", c.random.once_in(3));
    for (int i = 0; integers && i < 256; ++i) code[static_cast<size_t>(i)] = static_cast<int8_t>(i);
    const Statistics statistics(c, blocks, c.note("special", c.random.once_in(3)));
    const Buffer out(n * size_of(type), c.shift(), kOurs), theirs(out.size, 0, kTheirs);
    Dequantize<bits> a{codes.data, {}, statistics.scales, n, blocksize, out.data, type, integers};
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

}  // namespace

void quantize_4bit(Case& c) {
    quantize<4, Search4>(c, c.tier.quantize_4bit, scalar.quantize_4bit,
                         [](const std::vector<float>& code) { return search4(code.data()); });
}

void quantize_8bit(Case& c) {
    quantize<8, Search8>(c, c.tier.quantize_8bit, scalar.quantize_8bit, [](const std::vector<float>& code) {
        return search8(code.data(), static_cast<int>(code.size()));
    });
}

void dequantize_4bit(Case& c) { dequantize<4>(c, c.tier.dequantize_4bit, scalar.dequantize_4bit); }
void dequantize_8bit(Case& c) { dequantize<8>(c, c.tier.dequantize_8bit, scalar.dequantize_8bit); }

}  // namespace halfbyte

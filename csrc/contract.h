// The contract between the tiers (one file per instruction set) and everything else.
//
// A tier is a table of functions. Each function works through a range of quantization blocks on the calling thread;
// blocks do not depend on each other, so any split into ranges, by any number of threads, gives the same bytes.
// The formulas are those of src/halfbyte/kernels/reference.py, and every tier agrees with them bitwise: arithmetic is
// fp32, each product and sum rounded on its own (-ffp-contract=off). A NaN stays a NaN; its payload is not promised.
// Matrix products (matmul.h) and 32-bit AdamW (adamw.h) say themselves what they promise.
//
// Layout: a tensor is n values, row-major, cut into ceil(n / blocksize) blocks, of which the last may be short. 4-bit
// codes are packed two to a byte, the first in the high half.
//
// Functions are silent and total: arguments were checked in Python, nothing is allocated, printed or thrown. Pointers
// to void or uint8_t may have any address; those to float are aligned for it.
//
// Weak (inline or template) functions of the standard library must not be instantiated under a tier's instruction set,
// since the linker may keep that copy for everybody: so tier files are compiled for the baseline, raise the target only
// around their own functions, keep those in an anonymous namespace, and include nothing inside but .inl files, which
// are written once over a tier's own types (lanes.inl, rows.h) and include nothing themselves.

#pragma once

#include <cstdint>
#include <cstring>

namespace halfbyte {

enum class Type : int { fp32, bf16, fp16 };

// The midpoints between neighbouring values of a table, as an implicit binary search tree: the children of node i are
// 2i and 2i + 1. From node 1 one goes to the right child when not (midpoint >= value), so NaN always goes right; the
// leaf reached after 4 (or 8) steps, minus 16 (or 256), is the rank of the nearest value, the lower at a tie.
struct Search4 {
    float midpoint[16];
    uint8_t code[16];  // of each rank
};

// The same for a table in ascending order, where rank and code are one.
struct Search8 {
    float midpoint[256];  // +inf beyond the table's end
    int32_t last;         // the largest code
};

template <class Search>
struct Quantize {
    const void* x;  // n values of `type`
    Type type;
    int64_t n;
    int64_t blocksize;
    Search search;
    uint8_t* codes;  // out: n bytes, or ceil(n / 2) for 4 bits
    float* absmax;   // out: one per block
};
using Quantize4bit = Quantize<Search4>;
using Quantize8bit = Quantize<Search8>;

// The scale of each block: fp32, or, doubly quantized, code[q] * nested absmax + offset for the 8-bit code q.
struct Scales {
    const void* absmax;  // fp32, or with `nested` uint8: one per block
    bool nested;
    const void* nested_absmax;  // fp32: one per nested_blocksize blocks
    int64_t nested_blocksize;
    float nested_code[256];
    float offset;
};

template <int bits>
struct Dequantize {
    const uint8_t* codes;   // n bytes, or ceil(n / 2) for 4 bits
    float code[1 << bits];  // the value of each code
    Scales scales;
    int64_t n;
    int64_t blocksize;
    void* out;  // out: n values of `type`
    Type type;
    bool integers = false;  // whether code[q] is the int8 that the byte q is, which is told and not looked for
};
using Dequantize4bit = Dequantize<4>;
using Dequantize8bit = Dequantize<8>;

struct MatmulKernels;
struct AdamwKernels;
struct AttentionKernels;
struct RowKernels;

// The blocks [first, last). With 4 bits and an odd block size `first` must be even, so that no byte is shared between
// ranges.
struct Tier {
    const char* name;
    bool (*supported)();  // whether this chip, with its operating system, has the instructions
    void (*quantize_4bit)(const Quantize4bit&, int64_t first, int64_t last);
    void (*quantize_8bit)(const Quantize8bit&, int64_t first, int64_t last);
    void (*dequantize_4bit)(const Dequantize4bit&, int64_t first, int64_t last);
    void (*dequantize_8bit)(const Dequantize8bit&, int64_t first, int64_t last);
    const MatmulKernels* (*matmul)(Type);  // see matmul.h; null: none
    const AdamwKernels* adamw;             // see adamw.h
    const RowKernels* rows;                // see rows.h
    // See attention.h; null: none. `pairs` as in the products of this type.
    const AttentionKernels* (*attention)(Type, bool pairs);
};

extern const Tier scalar;  // the baseline, everywhere; the other tiers leave odd cases to it
extern const Tier avx2;    // AVX2, FMA, F16C
extern const Tier avx512;  // AVX-512 F, BW, VL, DQ
extern const Tier amx;     // AMX-BF16, beside AVX-512 with BF16
extern const Tier neon;    // 64-bit Arm

namespace {

// The smallest divisor that a block is scaled with (subnormal in fp32).
constexpr float kSmallestAbsmax = 1e-38f;

// Read element i of an array at any address.
template <class T>
T load(const void* base, int64_t i) {
    T value;
    std::memcpy(&value, static_cast<const char*>(base) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
}

// The rank of the nearest value, by a midpoint tree of 2^bits nodes.
template <int bits>
int descend(const float* midpoint, float value) {
    int node = 1;
    for (int step = 0; step < bits; ++step) node = 2 * node + !(midpoint[node] >= value);
    return node - (1 << bits);
}

// NaN passes.
inline float clamp(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

inline int nearest(const Search8& search, float value) {
    const int rank = descend<8>(search.midpoint, value);
    return rank < search.last ? rank : search.last;
}

// The end of those blocks in [first, last) that a vector tier takes itself: whole ones of a multiple of 32 values. The
// rest is left to `scalar`.
template <class Arguments>
int64_t whole_blocks(const Arguments& a, int64_t first, int64_t last) {
    const int64_t whole = a.blocksize % 32 ? 0 : a.n / a.blocksize;
    return whole < first ? first : whole < last ? whole : last;
}

// Gives the scales of consecutive blocks.
class ScaleReader {
  public:
    ScaleReader(const Scales& scales, int64_t block)
        : scales_(scales),
          block_(block),
          group_(scales.nested ? block / scales.nested_blocksize : 0),
          within_(scales.nested ? block % scales.nested_blocksize : 0) {}

    float next() {
        if (!scales_.nested) return load<float>(scales_.absmax, block_++);
        const float value = scales_.nested_code[load<uint8_t>(scales_.absmax, block_++)];
        const float scale = value * load<float>(scales_.nested_absmax, group_) + scales_.offset;
        if (++within_ == scales_.nested_blocksize) {
            within_ = 0;
            ++group_;
        }
        return scale;
    }

  private:
    const Scales& scales_;
    int64_t block_, group_, within_;
};

}  // namespace
}  // namespace halfbyte

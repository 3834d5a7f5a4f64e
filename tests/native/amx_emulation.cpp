// A tile unit in plain C++, for machines without AMX: the products of csrc/amx_matmul.h over it are a tier for tests.
//
// It does what Intel's "64 and IA-32 Architectures Software Developer's Manual", volume 2, says of the instructions.
// TDPBF16PS sums the even and the odd values of the pairs apart by fused multiply-adds, adds the two, and that to the
// destination, rounding to nearest even; subnormal operands and results are zero. Where the chip would fault (no
// configuration, a wrong one, shapes that do not fit, one tile for two operands), the program ends with a message.

#if defined(__x86_64__)

#include "amx_emulation.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx.h"
#include "amx_matmul.h"

namespace halfbyte {
namespace {

class EmulatedUnit {
  public:
    // Outside the kernels no thread has a configuration.
    static void require_idle() { require(in_use_ == 0, "not released"); }

    static void configure() {
        const TileConfiguration& c = kFullTiles;
        Unit& u = unit();
        require(!u.configured, "configured twice");
        require(c.palette == 1 && c.start_row == 0, "LDTILECFG: palette or start row");
        for (const uint8_t byte : c.reserved) require(byte == 0, "LDTILECFG: reserved bytes");
        for (int i = 0; i < 16; ++i) {
            if (i >= kTiles) {
                require(c.rows[i] == 0 && c.row_bytes[i] == 0, "LDTILECFG: more tiles than there are");
                continue;
            }
            require(c.rows[i] <= 16 && c.row_bytes[i] <= 64, "LDTILECFG: a tile too large");
            require((c.rows[i] == 0) == (c.row_bytes[i] == 0), "LDTILECFG: half a tile");
            u.tiles[i] = {};
            u.tiles[i].rows = c.rows[i];
            u.tiles[i].row_bytes = c.row_bytes[i];
        }
        u.configured = true;
        ++in_use_;
    }

    static void release() {
        require(unit().configured, "released twice");
        unit().configured = false;
        --in_use_;
    }

    template <int number>
    static void load(const void* address, int64_t stride) {
        Tile& t = tile<number>();
        std::memset(t.values, 0, sizeof t.values);
        for (int64_t r = 0; r < t.rows; ++r) {
            std::memcpy(t.values[r], static_cast<const char*>(address) + r * stride, t.row_bytes);
        }
    }

    template <int number>
    static void store(void* address, int64_t stride) {
        const Tile& t = tile<number>();
        for (int64_t r = 0; r < t.rows; ++r) {
            std::memcpy(static_cast<char*>(address) + r * stride, t.values[r], t.row_bytes);
        }
    }

    template <int number>
    static void zero() {
        std::memset(tile<number>().values, 0, sizeof(Tile::values));
    }

    template <int sums, int x, int w>
    static void dot() {
        static_assert(sums != x && sums != w && x != w, "TDPBF16PS: one tile for two operands");
        Tile& c = tile<sums>();
        const Tile &a = tile<x>(), &b = tile<w>();
        require(a.rows == c.rows && b.row_bytes == c.row_bytes && b.rows == a.row_bytes / 4, "TDPBF16PS: shapes");
        require(a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "TDPBF16PS: row bytes");
        for (int m = 0; m < a.rows; ++m) {
            float even[16] = {}, odd[16] = {};
            for (int k = 0; k < a.row_bytes / 4; ++k) {
                for (int n = 0; n < b.row_bytes / 4; ++n) {
                    even[n] = flushed(std::fma(low(a.values[m][k]), low(b.values[k][n]), even[n]));
                    odd[n] = flushed(std::fma(high(a.values[m][k]), high(b.values[k][n]), odd[n]));
                }
            }
            for (int n = 0; n < b.row_bytes / 4; ++n) {
                const float sum = flushed(flushed(value(c.values[m][n])) + flushed(even[n] + odd[n]));
                std::memcpy(&c.values[m][n], &sum, 4);
            }
        }
    }

  private:
    static constexpr int kTiles = 8;

    struct Tile {
        int rows, row_bytes;
        uint32_t values[16][16];
    };

    struct Unit {
        bool configured;
        Tile tiles[kTiles];
    };

    static Unit& unit() {
        static thread_local Unit mine{};
        return mine;
    }

    template <int number>
    static Tile& tile() {
        static_assert(number >= 0 && number < kTiles, "no such tile");
        require(unit().configured, "a tile without a configuration");
        require(unit().tiles[number].rows > 0, "a tile that is not configured");
        return unit().tiles[number];
    }

    static void require(bool right, const char* what) {
        if (right) return;
        std::fprintf(stderr, "tile unit: %s\n", what);
        std::abort();
    }

    static float value(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    static float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

    // The two values of a pair.
    static float low(uint32_t pair) { return flushed(value(pair << 16)); }
    static float high(uint32_t pair) { return flushed(value(pair & 0xffff0000)); }

    inline static std::atomic<int> in_use_{0};
};

const MatmulKernels* emulated_matmul(Type type) {
    EmulatedUnit::require_idle();
    static const MatmulKernels bf16 = in_tiles<EmulatedUnit>();
    return type == Type::bf16 ? &bf16 : avx512_matmul(type);
}

Tier with_emulated_tiles(Tier tier) {
    tier.name = "amx, emulated";
    tier.supported = [] { return avx512.supported() && __builtin_cpu_supports("avx512bf16"); };
    tier.matmul = emulated_matmul;
    return tier;
}

}  // namespace

const Tier emulated_amx = with_emulated_tiles(avx512);

}  // namespace halfbyte

#endif

// The tile unit of AMX-BF16, an instruction to a function: what the products of amx_matmul.h are written over.
//
// Plain assembly: the compilers' intrinsics do not all say which memory they read, so that stores before them are lost,
// those of a configuration first of all. Here that is a constant, and what reads or writes memory is a barrier.
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace halfbyte {
namespace {

// What LDTILECFG reads. Palette 1 has eight tiles of at most 16 rows of 64 bytes; all are made so large.
struct TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64, "LDTILECFG reads 64 bytes");

alignas(64) constexpr TileConfiguration kFullTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16},
};

struct AmxUnit {
    static void configure() { asm volatile("ldtilecfg %0" : : "m"(kFullTiles) : "memory"); }

    static void release() { asm volatile("tilerelease" : : : "memory"); }

    template <int tile>
    static void load(const void* address, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(address), "r"(stride), "i"(tile) : "memory");
    }

    template <int tile>
    static void store(void* address, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(address), "r"(stride), "i"(tile) : "memory");
    }

    template <int tile>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(tile));
    }

    template <int sums, int x, int w>
    static void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(w));
    }
};

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

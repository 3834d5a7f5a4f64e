// Products of bf16 pairs in tiles, over a unit with the instructions of AMX-BF16.
//
// A tile is 16 rows of 64 bytes. The unit multiplies a tile of x (16 rows of 16 lanes) with one of a panel (16 lanes of
// 16 columns) and adds to a tile of sums (16 rows of 16 columns, fp32). Two by two tiles of sums are kept at a time,
// which four loads feed with four products; for a last row of tiles, all four of a strip.
//
// Rows of x that are a power of two apart drive each other out of the first cache, so x is copied into tiles, each of
// 1024 consecutive bytes: once for all columns of a product (`pack`), or, where rows are multiplied as they lie, within
// `multiply`. x and the panels are padded with zeros to whole tiles of the depth; where there are no whole tiles of
// rows, sums are kept in a buffer.
//
// A unit `T` has static functions, with tiles named by their numbers from 0 to 7: configure() makes all of them full,
// load<tile>(address, stride) and store<tile>(address, stride) take `stride` bytes from row to row, zero<tile>(),
// dot<sums, x, w>(), and release(), after which the operating system has no tiles to save. The drivers configure the
// unit once for a task: that takes some 200 cycles, and 32 rows of attention by 64 keys, with a head size of 64, 256.
//
// What depends on the chip was chosen by argument, given with it, and is not measured.
//
// This header raises the instruction set around its own functions: include it outside a target region.

#pragma once

#include "matmul.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")
#endif

namespace halfbyte {
namespace {

constexpr int64_t kTileRow = kTileBytes / kTile;  // bytes, as the next
constexpr int64_t kStripRow = kStrip * 4;
static_assert(kLanes % kTile == 0, "a full panel is whole tiles");

// Tiles along the depth that are multiplied with a whole strip before the next are: 32 rows of them take 16 KiB, which
// the first cache (48 KiB) keeps for the second half of the strip. So 48 bytes a cycle come from the second cache, not
// 64, its utmost, at the price of eight loads and stores of sums to 64 products.
constexpr int64_t kReach = 8;

// MatmulKernels::pack.
inline void pack(const void* x, int64_t stride, int64_t rows, int64_t depth, void* tiles) {
    const char* from = static_cast<const char*>(x);
    char* to = static_cast<char*>(tiles);
    for (int64_t rest = depth * 2; rest > 0; rest -= kTileRow, from += kTileRow) {
        for (int64_t r = 0; r < kTile; ++r, to += kTileRow) {
            if (r < rows && rest >= kTileRow) {
                std::memcpy(to, from + r * stride, kTileRow);
            } else {
                std::memset(to, 0, kTileRow);
                if (r < rows) std::memcpy(to, from + r * stride, static_cast<size_t>(rest));
            }
        }
    }
}

// 32 rows by 32 columns; `second` is where the second row of tiles begins.
template <class T>
void two_by_two(const char* x, const char* second, const float* panel, int64_t tiles, float* sums, bool add) {
    float* const below = sums + kTile * kStrip;
    if (add) {
        T::template load<0>(sums, kStripRow);
        T::template load<1>(sums + kTile, kStripRow);
        T::template load<2>(below, kStripRow);
        T::template load<3>(below + kTile, kStripRow);
    } else {
        T::template zero<0>();
        T::template zero<1>();
        T::template zero<2>();
        T::template zero<3>();
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < tiles; ++i) {
        T::template load<4>(x, kTileRow);
        T::template load<6>(panel, kStripRow);
        T::template dot<0, 4, 6>();
        T::template load<5>(second, kTileRow);
        T::template dot<2, 5, 6>();
        T::template load<7>(panel + kTile, kStripRow);
        T::template dot<1, 4, 7>();
        T::template dot<3, 5, 7>();
        x += kTileBytes;
        second += kTileBytes;
        panel += kTile * kStrip;
    }
    T::template store<0>(sums, kStripRow);
    T::template store<1>(sums + kTile, kStripRow);
    T::template store<2>(below, kStripRow);
    T::template store<3>(below + kTile, kStripRow);
}

// 16 rows by 64 columns.
template <class T>
void one_by_four(const char* x, const float* panel, int64_t tiles, float* sums, bool add) {
    if (add) {
        T::template load<0>(sums, kStripRow);
        T::template load<1>(sums + kTile, kStripRow);
        T::template load<2>(sums + 2 * kTile, kStripRow);
        T::template load<3>(sums + 3 * kTile, kStripRow);
    } else {
        T::template zero<0>();
        T::template zero<1>();
        T::template zero<2>();
        T::template zero<3>();
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < tiles; ++i) {
        T::template load<4>(x, kTileRow);
        T::template load<5>(panel, kStripRow);
        T::template dot<0, 4, 5>();
        T::template load<6>(panel + kTile, kStripRow);
        T::template dot<1, 4, 6>();
        T::template load<7>(panel + 2 * kTile, kStripRow);
        T::template dot<2, 4, 7>();
        T::template load<5>(panel + 3 * kTile, kStripRow);
        T::template dot<3, 4, 5>();
        x += kTileBytes;
        panel += kTile * kStrip;
    }
    T::template store<0>(sums, kStripRow);
    T::template store<1>(sums + kTile, kStripRow);
    T::template store<2>(sums + 2 * kTile, kStripRow);
    T::template store<3>(sums + 3 * kTile, kStripRow);
}

// One or two rows of tiles, the second `stride` bytes after the first. Without depth sums are zero too.
template <class T>
void multiply_rows(const char* x, int64_t stride, int64_t rows, const float* panel, int64_t tiles, int64_t columns,
                   float* sums, bool add) {
    int64_t i = 0;
    do {
        const char* const from = x + i * kTileBytes;
        const float* const lanes = panel + i * kTile * kStrip;
        const int64_t count = least(tiles - i, kReach);
        if (rows == kTile) {
            one_by_four<T>(from, lanes, count, sums, add || i > 0);
        } else {
            for (int64_t c = 0; c < columns; c += 2 * kTile) {
                two_by_two<T>(from, from + stride, lanes + c, count, sums + c, add || i > 0);
            }
        }
        i += kReach;
    } while (i < tiles);
}

// MatmulKernels::multiply_packed.
template <class T>
void multiply_packed(const void* tiles, int64_t stride, int64_t rows, const float* panel, int64_t lanes,
                     int64_t columns, float* sums, bool add) {
    const int64_t count = (lanes + kTile - 1) / kTile;
    for (int64_t row = 0; row < rows; row += 2 * kTile, sums += 2 * kTile * kStrip) {
        const char* const x = static_cast<const char*>(tiles) + row / kTile * stride;
        const int64_t left = least(rows - row, 2 * kTile);
        if (left % kTile == 0) {
            multiply_rows<T>(x, stride, left, panel, count, columns, sums, add);
            continue;
        }
        alignas(64) float buffer[2 * kTile * kStrip] = {};
        const size_t bytes = static_cast<size_t>(left * kStripRow);
        if (add) std::memcpy(buffer, sums, bytes);
        multiply_rows<T>(x, stride, left < kTile ? kTile : 2 * kTile, panel, count, columns, buffer, add);
        std::memcpy(sums, buffer, bytes);
    }
}

// MatmulKernels::multiply.
template <class T>
void multiply(const void* x, int64_t stride, int64_t rows, const float* panel, int64_t lanes, int64_t columns,
              float* sums, bool add) {
    constexpr int64_t most = kLanes / kTile * kTileBytes;
    alignas(64) char tiles[2 * most];
    for (int64_t r = 0; r < rows; r += kTile) {
        pack(static_cast<const char*>(x) + r * stride, stride, least(rows - r, kTile), 2 * lanes,
             tiles + r / kTile * most);
    }
    multiply_packed<T>(tiles, most, rows, panel, lanes, columns, sums, add);
}

// Fill a panel as the AVX-512 tier does, and pad it with zeros to whole tiles.
template <class Matrix, void (*MatmulKernels::*fill)(const Matrix&, int64_t, int64_t, int64_t, float*)>
void padded(const Matrix& w, int64_t column, int64_t first, int64_t last, float* panel) {
    (avx512_matmul(Type::bf16)->*fill)(w, column, first, last, panel);
    const int64_t lanes = (last - first + 1) / 2;
    std::memset(panel + lanes * kStrip, 0, static_cast<size_t>(-lanes & (kTile - 1)) * kStripRow);
}

// The AVX-512 tier's kernels for bf16 in pairs, but multiplying in tiles. `dot` remains for as many rows as there: with
// few, expanding is the work, and a panel costs more of it.
template <class T>
MatmulKernels in_tiles() {
    MatmulKernels kernels = *avx512_matmul(Type::bf16);
    kernels.tile_rows = 2 * kTile;
    kernels.expand_forward = padded<Weight4bit, &MatmulKernels::expand_forward>;
    kernels.expand_gradient = padded<Weight4bit, &MatmulKernels::expand_gradient>;
    kernels.dense_forward = padded<Dense, &MatmulKernels::dense_forward>;
    kernels.dense_gradient = padded<Dense, &MatmulKernels::dense_gradient>;
    kernels.bytes_forward = padded<Weight8bit, &MatmulKernels::bytes_forward>;
    kernels.bytes_gradient = padded<Weight8bit, &MatmulKernels::bytes_gradient>;
    kernels.multiply = multiply<T>;
    kernels.pack = pack;
    kernels.multiply_packed = multiply_packed<T>;
    kernels.begin = T::configure;
    kernels.end = T::release;
    return kernels;
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

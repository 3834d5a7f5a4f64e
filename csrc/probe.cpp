// Register-only loops at the peak of a tier's arithmetic: a roofline's roof.
//
// A round advances every accumulator by one instruction. There are enough of them to cover that instruction's latency
// times its throughput on any chip so far (6 cycles, 2 a cycle; of tiles 52, one in 16), and with the operands they fit
// the registers, into which the loops over them must be unrolled.

#include "probe.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "amx.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace halfbyte {
namespace {

bool always() { return true; }

// Multiply and add apart (-ffp-contract=off), in whatever vectors the compiler's baseline has.
float multiply_add(int64_t rounds) {
    float sums[48];
    for (int i = 0; i < 48; ++i) sums[i] = static_cast<float>(i);
    for (int64_t round = 0; round < rounds; ++round) {
        for (float& sum : sums) sum = sum * 0.5f + 1.0f;
    }
    float total = 0.0f;
    for (const float sum : sums) total += sum;
    return total;
}

}  // namespace
}  // namespace halfbyte

#if defined(__x86_64__)

namespace halfbyte {
namespace {

constexpr int kSums = 12;

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace halfbyte {
namespace {

float fma_256(int64_t rounds) {
    const __m256 factor = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
    __m256 sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, one);
    }
    __m256 total = _mm256_setzero_ps();
#pragma GCC unroll 12
    for (const __m256 sum : sums) total = _mm256_add_ps(total, sum);
    return _mm256_cvtss_f32(total);
}

// 64 values from 32 bytes of codes to fp32 lanes, as csrc/avx2_few.cpp takes them: nibbles, two byte shuffles for 32
// values, words interleaved, and a word's halves as the upper halves of fp32. Each feeds a sum, for which the bits are
// combined by the cheapest instruction there is; a multiply-add takes its place in a product of one row.
int look_up_256(int64_t rounds) {
    const __m256i mask = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const __m256i lows = _mm256_set1_epi64x(0x0706050403020100), highs = _mm256_set1_epi64x(0x4746454443424140);
    __m256i codes = _mm256_set1_epi64x(0x1032547698badcfe);
    __m256i found[4];
#pragma GCC unroll 4
    for (__m256i& each : found) each = _mm256_setzero_si256();
    for (int64_t round = 0; round < rounds; ++round) {
        codes = _mm256_add_epi8(codes, mask);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256i index = _mm256_and_si256(half ? codes : _mm256_srli_epi16(codes, 4), mask);
            const __m256i low = _mm256_shuffle_epi8(lows, index), high = _mm256_shuffle_epi8(highs, index);
            const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                found[2 * i] = _mm256_xor_si256(found[2 * i], _mm256_slli_epi32(words[i], 16));
                found[2 * i + 1] = _mm256_xor_si256(found[2 * i + 1], _mm256_and_si256(words[i], upper));
            }
        }
    }
    const __m256i first = _mm256_xor_si256(found[0], found[1]), second = _mm256_xor_si256(found[2], found[3]);
    return _mm256_extract_epi32(_mm256_add_epi32(first, second), 0);
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace halfbyte {
namespace {

float fma_512(int64_t rounds) {
    const __m512 factor = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
    __m512 sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, one);
    }
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 12
    for (const __m512 sum : sums) total = _mm512_add_ps(total, sum);
    return _mm512_cvtss_f32(total);
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16")
#endif

namespace halfbyte {
namespace {

float dot_bf16(int64_t rounds) {
    const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
    __m512 sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, factor, factor);
    }
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 12
    for (const __m512 sum : sums) total = _mm512_add_ps(total, sum);
    return _mm512_cvtss_f32(total);
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace halfbyte {
namespace {

float dot_tiles(int64_t rounds) {
    uint32_t halves[16 * 16];
    for (uint32_t& pair : halves) pair = 0x3f003f00;
    float sums[16 * 16];
    AmxUnit::configure();
    AmxUnit::load<6>(halves, 64);
    AmxUnit::load<7>(halves, 64);
    AmxUnit::zero<0>();
    AmxUnit::zero<1>();
    AmxUnit::zero<2>();
    AmxUnit::zero<3>();
    AmxUnit::zero<4>();
    AmxUnit::zero<5>();
    for (int64_t round = 0; round < rounds; ++round) {
        AmxUnit::dot<0, 6, 7>();
        AmxUnit::dot<1, 6, 7>();
        AmxUnit::dot<2, 6, 7>();
        AmxUnit::dot<3, 6, 7>();
        AmxUnit::dot<4, 6, 7>();
        AmxUnit::dot<5, 6, 7>();
    }
    AmxUnit::store<0>(sums, 64);
    AmxUnit::release();
    return sums[0];
}

}  // namespace
}  // namespace halfbyte

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#elif defined(__aarch64__)

namespace halfbyte {
namespace {

float fma_128(int64_t rounds) {
    constexpr int sums = 24;  // up to four a cycle
    const float32x4_t factor = vdupq_n_f32(0.5f), one = vdupq_n_f32(1.0f);
    float32x4_t sum[sums];
#pragma GCC unroll 24
    for (int i = 0; i < sums; ++i) sum[i] = vdupq_n_f32(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (float32x4_t& each : sum) each = vfmaq_f32(each, factor, one);  // which overwrites its first operand
    }
    float32x4_t total = vdupq_n_f32(0.0f);
#pragma GCC unroll 24
    for (const float32x4_t each : sum) total = vaddq_f32(total, each);
    return vgetq_lane_f32(total, 0);
}

}  // namespace
}  // namespace halfbyte

#endif

namespace halfbyte {
namespace {

// Best first within a tier; each tier ends with one that it always has.
const Probe probes[] = {
#if defined(__x86_64__)
    {&amx, "bf16 tiles", always, 6 * 16 * 16 * 64, dot_tiles},
    {&avx512, "bf16 dot products, 512 bits", [] { return bool(__builtin_cpu_supports("avx512bf16")); }, kSums * 64,
     dot_bf16},
    {&avx512, "fp32 multiply-adds, 512 bits", always, kSums * 32, fma_512},
    {&avx2, "fp32 multiply-adds, 256 bits", always, kSums * 16, fma_256},
#elif defined(__aarch64__)
    {&neon, "fp32 multiply-adds, 128 bits", always, 24 * 8, fma_128},
#endif
    {&scalar, "fp32 multiplications and additions, the compiler's baseline", always, 48 * 2, multiply_add},
};

}  // namespace

const Probe& probe_of(const Tier& tier) {
    const Probe* probe = probes;
    while (probe->tier != &tier || !probe->supported()) ++probe;
    return *probe;
}

const LookupProbe* lookup_probe_of([[maybe_unused]] const Tier& tier) {
#if defined(__x86_64__)
    static const LookupProbe shuffles{&avx2, 64, look_up_256};
    if (&tier == &avx2) return &shuffles;
#endif
    return nullptr;
}

}  // namespace halfbyte

// Register-only loops at the peak of a tier's arithmetic: a roofline's roof.
//
// A round advances every accumulator by one instruction. There are enough of them to cover that instruction's latency
// times its throughput on any chip so far (6 cycles, 2 a cycle), and with the operands they fit the registers, into which
// the loops over them must be unrolled.

#include "probe.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace halfbyte {
namespace {

constexpr int kSums = 12;

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
        for (float32x4_t& each : sum) each = vfmaq_f32(each, factor, one);  // the sum is the operand that is overwritten
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

}  // namespace halfbyte

// The AVX-512 tier's rows of attention. P's elements are rounded by the bf16 unit, where products are in pairs.
//
// The whole file is compiled with AVX512_BF16, since its intrinsics need it and a compiler uses it for nothing else.

#if defined(__x86_64__)

#include "attention.h"
#include "avx512_lanes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace halfbyte {
namespace {

struct Bf16OfUnit : Bf16 {
    static void store(void* out, int64_t i, __m512 value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(out, i, 2)), (__m256i)_mm512_cvtneps_pbh(value));
    }
};

}  // namespace
}  // namespace halfbyte

#include "attention_rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const AttentionKernels* avx512_attention(Type type, bool pairs) {
    switch (type) {
        case Type::fp16: return &attention_kernels<Fp32, Fp16>;
        case Type::bf16: return pairs ? &attention_kernels<Bf16OfUnit, Bf16> : &attention_kernels<Fp32, Bf16>;
        default: return &attention_kernels<Fp32, Fp32>;
    }
}

}  // namespace halfbyte

#endif

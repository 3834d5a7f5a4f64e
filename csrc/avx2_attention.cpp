// The AVX2 tier's rows of attention.

#if defined(__x86_64__)

#include "attention.h"
#include "avx2_lanes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attention_rows.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace halfbyte {

const AttentionKernels* avx2_attention(Type type, bool) {
    switch (type) {
        case Type::fp16: return &attention_kernels<Fp32, Fp16>;
        case Type::bf16: return &attention_kernels<Fp32, Bf16>;
        default: return &attention_kernels<Fp32, Fp32>;
    }
}

}  // namespace halfbyte

#endif

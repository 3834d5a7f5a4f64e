// The NEON tier's rows of attention.

#if defined(__aarch64__)

#include "attention.h"
#include "neon_lanes.h"

#include "attention_rows.inl"

namespace halfbyte {

const AttentionKernels* neon_attention(Type type, bool) {
    switch (type) {
        case Type::fp16: return &attention_kernels<Fp32, Fp16>;
        case Type::bf16: return &attention_kernels<Fp32, Bf16>;
        default: return &attention_kernels<Fp32, Fp32>;
    }
}

}  // namespace halfbyte

#endif

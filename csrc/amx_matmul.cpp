// The AMX tier's products: bf16 in tiles, fp32 and fp16 as the AVX-512 tier has them.

#if defined(__x86_64__)

#include "amx.h"
#include "amx_matmul.h"

namespace halfbyte {

const MatmulKernels* amx_matmul(Type type) {
    static const MatmulKernels bf16 = in_tiles<AmxUnit>();
    return type == Type::bf16 ? &bf16 : avx512_matmul(type);
}

}  // namespace halfbyte

#endif

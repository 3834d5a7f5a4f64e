// The kernels of rows.h, over a tier's lanes: each tier's *_rows.cpp includes this within its target region, after the
// tier's lanes header. It includes nothing but .inl files.

#include "softmax.inl"

namespace halfbyte {
namespace {

template <Lanes (*f)(Lanes)>
void elementary(const float* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) write<Fp32>(y, i, f(read<Fp32>(x, i, n - i)), n - i);
}

#include "norm.inl"
#include "gated.inl"
#include "rotary.inl"
#include "decode_rows.inl"

constexpr RowKernels row_kernels = {
    elementary<exp>,
    elementary<sigmoid>,
    elementary<tanh>,
    {rms_norm<Fp32>, rms_norm<Bf16>, rms_norm<Fp16>},
    {rms_norm_gradient<Fp32>, rms_norm_gradient<Bf16>, rms_norm_gradient<Fp16>},
    {rms_norm_weight_gradient<Fp32>, rms_norm_weight_gradient<Bf16>, rms_norm_weight_gradient<Fp16>},
    {{gated<Fp32, Silu>, gated<Bf16, Silu>, gated<Fp16, Silu>},
     {gated<Fp32, GeluTanh>, gated<Bf16, GeluTanh>, gated<Fp16, GeluTanh>}},
    {{gated_gradient<Fp32, Silu>, gated_gradient<Bf16, Silu>, gated_gradient<Fp16, Silu>},
     {gated_gradient<Fp32, GeluTanh>, gated_gradient<Bf16, GeluTanh>, gated_gradient<Fp16, GeluTanh>}},
    {{rotary<Fp32, Fp32>, rotary<Bf16, Bf16>, rotary<Fp16, Fp16>},
     {rotary<Fp32, Fp32>, rotary<Bf16, Fp32>, rotary<Fp16, Fp32>}},
    fold_softmax,
    {decode_kernels<Fp32>, decode_kernels<Bf16>, decode_kernels<Fp16>},
    {{4, attend_pages<Fp32>, store_head<Fp32>},
     {2, attend_pages<Bf16>, store_head<Bf16>},
     {2, attend_pages<Fp16>, store_head<Fp16>},
     {1, attend_pages<Int8>, store_head_int8}},
};

}  // namespace
}  // namespace halfbyte

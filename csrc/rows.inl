// The kernels of rows.h, over a tier's lanes: each tier's *_rows.cpp includes this within its target region, after the
// tier's lanes header. It includes nothing but .inl files.

#include "softmax.inl"

namespace halfbyte {
namespace {

template <Lanes (*f)(Lanes)>
void elementary(const float* x, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += Lanes::kWidth) write<Fp32>(y, i, f(read<Fp32>(x, i, n - i)), n - i);
}

constexpr RowKernels row_kernels = {
    elementary<exp>,
    elementary<sigmoid>,
    elementary<tanh>,
    fold_softmax,
};

}  // namespace
}  // namespace halfbyte

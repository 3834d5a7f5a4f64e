// RMSNorm (arXiv 1910.07467) with the residual added before it: two sweeps over a row, the second from the first-level
// cache, so one pass over memory. With s = 1 / sqrt(mean(h²) + eps) and g = dy (offset + weight):
//
//     h = x + residual,  y = h s (offset + weight),  dx = dresidual = dh + s (g - h s² mean(g h))

template <class T>
void rms_norm(const RmsNorm& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const bool adds = a.residual.data != nullptr;
        const int64_t x = row * a.x.stride, residual = row * a.residual.stride, y = row * a.width;
        Lanes squares;
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i;
            Lanes h = read<T>(a.x.data, x + i, left);
            if (adds) {
                h = nearest<T>(h + read<T>(a.residual.data, residual + i, left));
                write<T>(a.h, y + i, h, left);
            }
            squares = fma(h, h, squares);
        }
        const float scale = 1.0f / sqrtf(sum(squares) / static_cast<float>(a.width) + a.eps);
        a.scale[row] = scale;
        const void* source = adds ? a.h : a.x.data;
        const int64_t h = adds ? y : x;
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i;
            const Lanes weight = Lanes(a.offset) + read<T>(a.weight, i, left);
            const Lanes normalized = read<T>(source, h + i, left) * Lanes(scale);
            write<T>(a.y, y + i, (a.rounded ? nearest<T>(normalized) : normalized) * weight, left);
        }
    }
}

template <class T>
void rms_norm_gradient(const RmsNormGradient& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const int64_t dy = row * a.dy.stride, h = row * a.h.stride, dh = row * a.dh.stride;
        Lanes products;
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i;
            const Lanes weight = Lanes(a.offset) + read<T>(a.weight, i, left);
            products = fma(read<T>(a.dy.data, dy + i, left) * weight, read<T>(a.h.data, h + i, left), products);
        }
        const float scale = a.scale[row];
        const Lanes share = -(sum(products) / static_cast<float>(a.width) * scale * scale * scale);
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i;
            const Lanes weight = Lanes(a.offset) + read<T>(a.weight, i, left);
            const Lanes inner = read<T>(a.dy.data, dy + i, left) * weight * Lanes(scale);
            Lanes dx = fma(share, read<T>(a.h.data, h + i, left), inner);
            if (a.dh.data) dx = dx + read<T>(a.dh.data, dh + i, left);
            write<T>(a.dx, row * a.width + i, dx, left);
        }
    }
}

// Row after row, whoever has the column.
template <class T>
void rms_norm_weight_gradient(const RmsNormWeightGradient& a, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += Lanes::kWidth) {
        const int64_t left = last - i;
        Lanes total;
        for (int64_t row = 0; row < a.rows; ++row) {
            const Lanes normalized = read<T>(a.h.data, row * a.h.stride + i, left) * Lanes(a.scale[row]);
            total = fma(read<T>(a.dy.data, row * a.dy.stride + i, left), normalized, total);
        }
        write<Fp32>(a.dweight, i, total, left);
    }
}

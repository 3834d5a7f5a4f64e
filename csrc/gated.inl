// Gated linear units (arXiv 2002.05202): y = f(gate) up, with
//
//     silu(x) = x σ(x)    gelu_tanh(x) = x σ(2 √(2/π) (x + 0.044715 x³))
//
// (x/2 (1 + tanh(u)) = x σ(2u)). The gradient computes σ again.

struct Silu {
    Lanes value, slope;

    explicit Silu(Lanes x) {
        const Lanes s = sigmoid(x);
        value = x * s;
        slope = fma(value, Lanes(1.0f) - s, s);
    }
};

struct GeluTanh {
    Lanes value, slope;

    explicit GeluTanh(Lanes x) {
        const Lanes linear = 1.59576912f, cubic = 0.0713548163f, square = x * x;  // 2 √(2/π), that times 0.044715
        const Lanes s = sigmoid(x * fma(cubic, square, linear));
        value = x * s;
        slope = fma(value * (Lanes(1.0f) - s), fma(Lanes(3.0f) * cubic, square, linear), s);
    }
};

template <class T, class Activation>
void gated(const Gated& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i;
            const Activation gate(read<T>(a.gate.data, row * a.gate.stride + i, left));
            write<T>(a.y, row * a.width + i, gate.value * read<T>(a.up.data, row * a.up.stride + i, left), left);
        }
    }
}

template <class T, class Activation>
void gated_gradient(const GatedGradient& a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        for (int64_t i = 0; i < a.width; i += Lanes::kWidth) {
            const int64_t left = a.width - i, out = row * a.stride + i;
            const Activation gate(read<T>(a.gate.data, row * a.gate.stride + i, left));
            const Lanes dy = read<T>(a.dy.data, row * a.dy.stride + i, left);
            write<T>(a.dup, out, dy * gate.value, left);
            write<T>(a.dgate, out, dy * read<T>(a.up.data, row * a.up.stride + i, left) * gate.slope, left);
        }
    }
}

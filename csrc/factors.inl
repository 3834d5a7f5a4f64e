// Panels of dense matrices and of weights in bytes, written once: each tier's products include this within their target
// region and namespace, after pack_forward and pack_gradient, which fill a panel with the rows that they are given, and
// what gives rows: BytesRows<V> and DenseRows<V, S> of storage type S. V is what a panel's values are.

template <class V>
void dense_forward(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    switch (m.type) {
        case Type::fp32: return pack_forward(DenseRows<V, Fp32>{m}, column, first, last, panel);
        case Type::bf16: return pack_forward(DenseRows<V, Bf16>{m}, column, first, last, panel);
        case Type::fp16: return pack_forward(DenseRows<V, Fp16>{m}, column, first, last, panel);
    }
}

template <class V>
void dense_gradient(const Dense& m, int64_t column, int64_t first, int64_t last, float* panel) {
    switch (m.type) {
        case Type::fp32: return pack_gradient(DenseRows<V, Fp32>{m}, column, first, last, panel);
        case Type::bf16: return pack_gradient(DenseRows<V, Bf16>{m}, column, first, last, panel);
        case Type::fp16: return pack_gradient(DenseRows<V, Fp16>{m}, column, first, last, panel);
    }
}

template <class V>
void bytes_forward(const Weight8bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    pack_forward(BytesRows<V>{w}, column, first, last, panel);
}

template <class V>
void bytes_gradient(const Weight8bit& w, int64_t column, int64_t first, int64_t last, float* panel) {
    pack_gradient(BytesRows<V>{w}, column, first, last, panel);
}

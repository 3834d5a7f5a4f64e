// The entries of a vector tier's AdamwKernels, written once: each tier's file includes this within its target region
// and namespace, after its step_32bit<T> and step_8bit<T> for the storage types T.

void step_32bit_any(const Adamw& a, const Stepped32bit& t, int64_t first, int64_t last) {
    switch (t.type) {
        case Type::fp32: return step_32bit<Fp32>(a, t, first, last);
        case Type::bf16: return step_32bit<Bf16>(a, t, first, last);
        case Type::fp16: return step_32bit<Fp16>(a, t, first, last);
    }
}

void step_8bit_any(const Adamw& a, const Tables8bit& tables, const Stepped8bit& t, int64_t first, int64_t last) {
    const int64_t whole = vector_blocks(tables.blocksize, t.n, first, last);
    switch (t.type) {
        case Type::fp32: step_8bit<Fp32>(a, tables, t, first, whole); break;
        case Type::bf16: step_8bit<Bf16>(a, tables, t, first, whole); break;
        case Type::fp16: step_8bit<Fp16>(a, tables, t, first, whole); break;
    }
    scalar_adamw.step_8bit(a, tables, t, whole, last);
}

// The quantization entries of a vector tier's table, written once: each tier's file includes this within its target
// region and namespace, after its Searcher4 and Searcher8, quantize<T, Searcher> and dequantize<T> for the storage
// types T. Those take whole blocks of a multiple of 32 values; the rest goes to `scalar`.

template <class Searcher, class Arguments>
void quantize_any(const Arguments& a, int64_t first, int64_t last) {
    switch (a.type) {
        case Type::fp32: return quantize<Fp32, Searcher>(a, first, last);
        case Type::bf16: return quantize<Bf16, Searcher>(a, first, last);
        case Type::fp16: return quantize<Fp16, Searcher>(a, first, last);
    }
}

template <class Arguments>
void dequantize_any(const Arguments& a, int64_t first, int64_t last) {
    switch (a.type) {
        case Type::fp32: return dequantize<Fp32>(a, first, last);
        case Type::bf16: return dequantize<Bf16>(a, first, last);
        case Type::fp16: return dequantize<Fp16>(a, first, last);
    }
}

void quantize_4bit(const Quantize4bit& a, int64_t first, int64_t last) {
    const int64_t whole = whole_blocks(a, first, last);
    quantize_any<Searcher4>(a, first, whole);
    scalar.quantize_4bit(a, whole, last);
}

void quantize_8bit(const Quantize8bit& a, int64_t first, int64_t last) {
    const int64_t whole = whole_blocks(a, first, last);
    quantize_any<Searcher8>(a, first, whole);
    scalar.quantize_8bit(a, whole, last);
}

void dequantize_4bit(const Dequantize4bit& a, int64_t first, int64_t last) {
    const int64_t whole = whole_blocks(a, first, last);
    dequantize_any(a, first, whole);
    scalar.dequantize_4bit(a, whole, last);
}

void dequantize_8bit(const Dequantize8bit& a, int64_t first, int64_t last) {
    const int64_t whole = whole_blocks(a, first, last);
    dequantize_any(a, first, whole);
    scalar.dequantize_8bit(a, whole, last);
}
